"""Runs of `eval` that are interrupted, cut up, or beside each other, as a user sees them."""

from __future__ import annotations

import json
import os
import shlex
import signal
from importlib.resources import files
from pathlib import Path

import pytest

from llmkit.cli.output import Output
from llmkit.evaluation.answers import Answers

MODEL = Path(str(files("llmkit_evalsets"))) / "mini/base"


class Ending:
    """Progress of a run that gets a signal after so much of its scoring."""

    def __init__(self, number, share):
        self.number, self.share, self.left = number, share, 0.0

    def begin(self, total, label, unit="B"):
        self.left = self.share * total if label == "scoring" else float("inf")

    def advance(self, n, note=""):
        self.left -= n
        if self.left < 0:
            self.left = float("inf")
            os.kill(os.getpid(), self.number)

    def end(self):
        pass


@pytest.fixture
def ends(monkeypatch):
    """Make the next run end by a signal."""

    def arm(number, share=0.6):
        left = [Ending(number, share)]
        plain = Output.progress
        monkeypatch.setattr(Output, "progress", lambda self: left.pop() if left else plain(self))

    return arm


def arguments(output, *more):
    return ["eval", MODEL, "--bench", "mini", "--limit", "4", "--batch-tokens", "100", "-o", output, *more]


def scored(path):
    body = json.loads(path.read_text(encoding="utf-8"))
    subjects = {name: s["choices"] for name, s in body["benches"]["mini"]["subjects"].items()}
    return body["scores"], subjects


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_says_the_command_that_goes_on(call, ends, tmp_path, number):
    before = signal.getsignal(signal.SIGTERM)
    first, other = tmp_path / "a run.json", tmp_path / "other.json"
    ends(number)
    done = call(*arguments(first))
    assert done.code == 130
    assert f"answers are kept in {first}.answers" in done.err
    command = done.err.splitlines()[-1].partition("it goes on where it stopped: ")[2]
    assert shlex.split(command) == ["llmkit", *map(str, arguments(first))]
    assert not first.exists()
    assert signal.getsignal(signal.SIGTERM) is before
    # neither another output nor a threshold changes an answer
    done = call(*arguments(other, "--fail-under", "0"))
    assert done.code == 0, done.err
    assert "went on from an interrupted run" in done.err
    assert not list(tmp_path.glob("*.answers"))
    assert call(*arguments(first)).code == 0
    assert scored(first) == scored(other)


def test_a_second_run_with_the_same_output_is_refused_in_a_line(call, tmp_path):
    output = tmp_path / "run.json"
    held = Answers(tmp_path / "run.json.answers", "a run that goes on")
    done = call(*arguments(output))
    assert done.code == 2
    assert done.err.splitlines()[0] == f"error: {output} is being written by another llmkit process"
    held.close()
    assert call(*arguments(output)).code == 0


def test_a_part_that_dies_is_run_again_alone(call, ends, monkeypatch, tmp_path):
    whole, output = tmp_path / "whole.json", tmp_path / "run.json"
    parts = [tmp_path / f"run.shard-{i}-of-3.json" for i in (1, 2, 3)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        if rank == 1:
            ends(signal.SIGTERM, 0.9)
        done = call(*arguments(output, "--shard", "auto"))
        assert done.code == (130 if rank == 1 else 0), done.err
        assert f"this process does part {rank + 1}/3: {parts[rank]}" in done.err
    done = call("report", parts[0], parts[2], "-o", tmp_path / "made.json")
    assert (done.code, done.err.splitlines()) == (
        2,
        ["error: 1 of 3 shards is missing: 2", "hint: run it again alone: --shard 2/3"],
    )
    assert call(*arguments(parts[1], "--shard", "2/3")).code == 0  # goes on where rank 1 stopped
    assert "n_reused" in json.loads(parts[1].read_text())
    done = call("report", *parts, "-o", tmp_path / "made.json")
    assert done.code == 0, done.err
    monkeypatch.delenv("RANK")
    assert call(*arguments(whole)).code == 0
    assert scored(tmp_path / "made.json") == scored(whole)
    assert call("report", tmp_path / "made.json").out == call("report", *parts).out


def test_processes_that_all_score_everything_are_told_of_shards(call, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = call("eval", tmp_path / "no-model", "--bench", "mini")
    assert "torchrun started 2 processes, and each scores everything: --shard auto gives each a part" in done.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "1/3"], "--shard 1/3: the record of a part is of use in a file"),
        (["--shard", "5/3", "-o", "x.json"], "--shard '5/3' is no part of a whole"),
        (["--shard", "1/3", "-o", "x.json", "--fail-under", "0"], "--fail-under is not for one part of a run"),
        (["--memory", "much"], "size 'much' is not a number of bytes"),
        (["--memory", "100MiB"], "--memory 105 MB is too little: the weights take"),
        (["--backend", "vllm", "--memory", "8GiB"], "--memory is not for --backend vllm"),
        (["--url", "http://localhost:1"], "--url is not for --backend auto"),
    ],
)
def test_options_that_cannot_be(call, more, message, tmp_path):
    done = call("eval", MODEL, "--bench", "mini", *(tmp_path / m if m == "x.json" else m for m in more))
    assert done.code == 2
    assert message in done.err
