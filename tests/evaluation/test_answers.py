"""Answers that are kept: an interrupted run goes on, and gives the bytes of one that nothing disturbed."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from llmkit.evaluation.answers import Answers
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.runner import evaluate

BASE = Path(str(files("llmkit_evalsets"))) / "mini/base"


def scored(record) -> dict:
    body = record.to_json()
    result = body["benches"]["mini"]
    return {"scores": body["scores"], "subjects": result["subjects"], "samples": body["samples"]}


class Stopping:
    """Progress that is interrupted in the last of so many forwards."""

    def __init__(self, n_forwards):
        self.n_left, self.unit = n_forwards, ""

    def begin(self, total, label, unit="B"):
        self.unit = unit

    def advance(self, n, note=""):
        self.n_left -= self.unit == "tokens"
        if not self.n_left:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path):
    options = {"limit": 6, "shots": 1, "batch_tokens": 64, "log_samples": True, "subjects": ["star_lore"]}
    whole = evaluate(BASE, "mini", **options)
    keep = tmp_path / "answers"
    n_forwards = whole.benches["mini"].tokens["forwards"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(BASE, "mini", keep=keep, progress=Stopping(n_forwards), **options)
    n_kept = sum(len(json.loads(line).get("result", {}).get("reads", [])) for line in keep.read_text().splitlines())
    assert n_kept > 0
    resumed = evaluate(BASE, "mini", keep=keep, **options)
    assert resumed.n_reused == n_kept
    assert scored(resumed) == scored(whole)
    again = evaluate(BASE, "mini", keep=keep, **options)  # killed after the last answer
    assert again.benches["mini"].tokens["forwards"] == 0
    assert scored(again) == scored(whole)


def test_answers_of_other_settings_are_not_taken(tmp_path):
    options = {"limit": 1, "shots": 1, "subjects": ["star_lore"]}
    keep = tmp_path / "answers"
    evaluate(BASE, "mini", keep=keep, **options)
    assert evaluate(BASE, "mini", keep=keep, **options).n_reused > 0
    for change in ({"shots": 0}, {"batch_tokens": 128}):
        assert evaluate(BASE, "mini", keep=keep, **{**options, **change}).n_reused == 0


def test_answers_belong_to_the_very_queries_of_a_call(tmp_path):
    queries = [Query((1, 2, 3), (4,)), Query((1, 2), (5,))]
    answers = Answers(tmp_path / "kept", "digest")
    answers.of_queries(queries).add_reads([(0, 0, -0.1, True)])
    answers.of_queries(queries[:1]).add_reads([(0, 0, -0.2, False)])
    answers.of_prompts(["why"]).add_texts({0: "because"})
    answers.close()
    again = Answers(tmp_path / "kept", "digest")
    assert again.of_queries(queries).reads == {(0, 0): (-0.1, True)}
    assert again.of_queries(queries).reads == {}  # the second call had one query
    assert again.of_prompts(["why"]).texts == {0: "because"}
    assert again.n_reused == 2
    again.close()


def test_a_place_that_cannot_be_written_keeps_nothing_and_disturbs_nothing(tmp_path):
    for path in (tmp_path / "no/such/folder", None):
        kept = Answers(path, "digest").of_queries([Query((1,), (2,))])
        kept.add_reads([(0, 0, -0.1, True)])
        assert kept.reads == {}
    held = Answers(tmp_path / "kept", "digest")
    other = Answers(tmp_path / "kept", "digest")  # the same command in another process
    other.of_queries([Query((1,), (2,))]).add_reads([(0, 0, -0.1, True)])
    held.close()
    assert Answers(tmp_path / "kept", "digest").of_queries([Query((1,), (2,))]).reads == {}
