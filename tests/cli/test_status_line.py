"""In a terminal no command is quiet for more than two seconds, and what says so is gone before anything else is."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
import time

import pytest

from llmkit.cli.output import Mode, Output
from llmkit.cli.progress import Bar


class Terminal(io.TextIOWrapper):
    """One end of a pseudo-terminal; `read_all` gives what was written to it."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        super().__init__(io.FileIO(slave, "w"), encoding="utf-8", write_through=True)

    def wait_for(self, pattern: str) -> str:
        """All that was written, as soon as some of it is like the pattern: a busy machine may take its time."""
        written, end = "", time.monotonic() + 60
        while not re.search(pattern, written):
            assert time.monotonic() < end, written
            written += self.read_all()
        return written

    def read_all(self) -> str:
        written = b""  # the kernel hands it over in pieces
        while select.select([self.master], [], [], 0.1)[0]:
            written += os.read(self.master, 65536)
        return written.decode()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("LLMKIT_NO_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()

    def take() -> Terminal:  # in the test itself: pytest sets both anew after the fixtures
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setattr(sys, "stderr", made)
        return made

    yield take
    os.close(made.master)


def test_a_quiet_command_says_that_it_is_at_work(terminal):
    screen = terminal()
    out = Output().at_work("llmkit verify")
    with out.status_line:
        assert re.fullmatch(r"(\rllmkit verify, \d+ s\x1b\[K)+", screen.wait_for("verify, .*K"))
        out.doing("loading vicuna-7b")
        screen.wait_for(r"\rloading vicuna-7b, \d+ s\x1b\[K")
        out.line("done")
    assert re.fullmatch(r"(\rloading vicuna-7b, \d+ s\x1b\[K)*\r\x1b\[Kdone\r\n", screen.read_all())


def test_nothing_is_drawn_over_a_bar_or_within_a_line(terminal):
    screen = terminal()
    out = Output().at_work("llmkit verify")
    with out.status_line:
        out.text("half a line")
        time.sleep(1.4)
        assert screen.read_all().endswith("half a line")
        out.line()
        bar = out.progress()
        assert isinstance(bar, Bar)
        bar.begin(2, "reading")
        screen.read_all()  # a busy machine may have been late between the line and the bar
        time.sleep(1.4)
        assert "llmkit verify" not in screen.read_all()
        bar.end()
        bar.end()
        screen.wait_for(r"\rllmkit verify, ")


@pytest.mark.parametrize("mode", [Mode.JSON, Mode.QUIET])
def test_nothing_is_drawn_where_it_is_not_wanted(terminal, mode):
    screen = terminal()
    with Output(mode).at_work("llmkit verify").status_line:
        time.sleep(1.3)
    assert screen.read_all() == ""
