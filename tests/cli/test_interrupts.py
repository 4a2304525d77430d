"""Ctrl-C and SIGTERM as a process meets them: answered at once, and a second one ends it where it stands."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from llmkit.cli import command
from llmkit.cli.app import main

# A process whose work in hand takes long, as a product of large matrices does.
PROGRAM = """
import sys, time
from llmkit.cli.interrupts import Interrupted, heard, interruptible, terminable
def end(stop):
    print(f"last: {stop.message}", file=sys.stderr, flush=True)
    return 130
try:
    kept = lambda: Interrupted(is_resumable=True, kept="OUT keeps it")
    with terminable(), heard(end, grace_s=0.1, again_s=1.5), interruptible(kept):
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(float(sys.argv[1]))
            raise
except Interrupted as stop:
    sys.exit(end(stop))
"""


@pytest.fixture
def started():
    running = []

    def start(seconds):
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(seconds)], stdout=pipe, stderr=pipe, text=True)
        running.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_what_ends_at_once_says_one_line(started):
    process = started(0)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "last: interrupted; OUT keeps it\n"
    assert process.returncode == 130


def test_what_is_kept_is_said_while_the_work_in_hand_goes_on(started):
    process = started(30)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as `timeout` does, to the process and to its group
    assert process.stderr.readline() == "stopping; OUT keeps it (a second Ctrl-C ends it at once)\n"
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == "last: interrupted; OUT keeps it\n"
    assert process.returncode == 130


def test_an_interrupt_before_the_command_begins_is_said(monkeypatch, capsys):
    """Typer makes an exit code of it, without a word."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "require_folder", interrupted)
    assert main(["plugins", "list"]) == 130
    assert "error: interrupted; nothing is kept" in capsys.readouterr().err
