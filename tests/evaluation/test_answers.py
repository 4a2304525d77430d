"""Answers that are kept: an interrupted run goes on, and gives the bytes of one that nothing disturbed."""

from __future__ import annotations

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.evaluation.answers import Answers
from llmkit.evaluation.identity import answers_key, describe_model
from llmkit.evaluation.prefix import Query
from llmkit.pipeline.journal import HeldElsewhere
from tests.evaluation.running import evaluate

BASE = Path(str(files("llmkit_evalsets"))) / "mini/base"


def scored(record) -> dict:
    body = record.to_json()
    result = body["benches"]["mini"]
    return {"scores": body["scores"], "subjects": result["subjects"], "samples": body["samples"]}


class Stopping:
    """Progress that is interrupted after so much of the scoring."""

    def __init__(self, share):
        self.share, self.label, self.left = share, "", 0.0

    def begin(self, total, label, unit="B"):
        self.label, self.left = label, self.share * total

    def advance(self, n, note=""):
        self.left -= n
        if self.label == "scoring" and self.left < 0:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_nothing_is_left_where_nothing_was_answered(tmp_path):
    keep = tmp_path / "run.json.answers"
    Answers(keep, "digest").close()
    assert list(tmp_path.iterdir()) == []
    answers = Answers(keep, "digest")
    answers.of_prompts(["x"]).add_texts({0: "y"})
    answers.close()
    Answers(keep, "digest").close()  # what an earlier run left stays
    assert keep.is_file()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path):
    options = {"limit": 6, "shots": 1, "batch_tokens": 64, "log_samples": True, "subjects": ["star_lore"]}
    whole = evaluate(BASE, "mini", **options)
    keep = tmp_path / "answers"
    with pytest.raises(KeyboardInterrupt):
        evaluate(BASE, "mini", keep=keep, progress=Stopping(0.8), **options)
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
    answers.of_queries(queries).add_reads([(0, 0, -0.1, True, 2.5)])
    answers.of_queries(queries[:1]).add_reads([(0, 0, -0.2, False, 1.5)])
    answers.of_prompts(["why"]).add_texts({0: "because"})
    answers.close()
    again = Answers(tmp_path / "kept", "digest")
    assert again.of_queries(queries).reads == {(0, 0): (-0.1, True, 2.5)}
    assert again.of_queries(queries).reads == {}  # the second call had one query
    assert again.of_prompts(["why"]).texts == {0: "because"}
    assert again.n_reused == 2
    again.close()


def test_a_place_that_cannot_be_written_keeps_nothing_and_disturbs_nothing(tmp_path):
    for path in (tmp_path / "no/such/folder", None):
        kept = Answers(path, "digest").of_queries([Query((1,), (2,))])
        kept.add_reads([(0, 0, -0.1, True, 2.5)])
        assert kept.reads == {}


def test_one_journal_serves_one_process(tmp_path):
    held = Answers(tmp_path / "run.json.answers", "digest")
    with pytest.raises(HeldElsewhere, match=r"run.json is being written by another llmkit process"):
        Answers(tmp_path / "run.json.answers", "digest", str(tmp_path / "run.json"))
    with pytest.raises(HeldElsewhere, match=r"run.json is being"):  # before anything is loaded
        evaluate(tmp_path / "no-model", "mini", keep=tmp_path / "run.json.answers")
    held.close()
    Answers(tmp_path / "run.json.answers", "digest").close()


def test_answers_of_the_same_run_under_another_name_are_taken_over(tmp_path):
    one = Answers(tmp_path / "one.json.answers", "digest")
    one.of_prompts(["why"]).add_texts({0: "because"})
    beside = Answers(tmp_path / "two.json.answers", "digest")
    assert beside.of_prompts(["why"]).texts == {}  # that run still goes on: nothing is shared
    beside.close()
    one.close()
    other = Answers(tmp_path / "three.json.answers", "another digest")
    assert other.of_prompts(["why"]).texts == {}
    other.close()
    for _ in range(2):  # taken over, they are this journal's own
        again = Answers(tmp_path / "four.json.answers", "digest")
        assert again.of_prompts(["why"]).texts == {0: "because"}
        again.close()
    assert not (tmp_path / "one.json.answers").exists()


def test_the_key_is_of_contents_not_of_places_and_times(tmp_path):
    def key(folder, **settings):
        described = describe_model(open_checkpoint(folder))
        return answers_key(described, {"data": str(folder), **settings}, {"dtype": "float32", "device": "cpu"})

    first = tmp_path / "a/model"
    shutil.copytree(BASE, first)
    assert key(first) == key(shutil.copytree(first, tmp_path / "b"))
    assert key(first) != key(first, shots=3)
    (weights,) = first.glob("*.safetensors")
    times = weights.stat()
    before, data = key(first), bytearray(weights.read_bytes())
    data[-1] ^= 1  # another model, of the same size and the same time
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert key(first) != before
