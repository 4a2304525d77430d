"""`eval --show`: what is printed is what a run sends, and no weights are read for it."""

from __future__ import annotations

import json

import pytest
from small_benchmarks import SUBJECTS, write_benchmarks

from llmkit.errors import InputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.planning import Selection
from llmkit.evaluation.protocol import protocol_named, protocol_names
from llmkit.evaluation.runner import preview
from llmkit.evaluation.scoring import Scorer
from tests.evaluation.running import evaluate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("data"), lambda bench: ("dev", "test", "val"))


def refuse(*args):
    raise AssertionError("the model was opened to be computed")


@pytest.mark.parametrize(("bench", "protocol"), [(b, p) for b in SUBJECTS for p in protocol_names(b)])
def test_what_is_shown_is_what_is_sent(model, data, monkeypatch, bench, protocol):
    shots = protocol_named(load_bench(bench), protocol).shots
    shots = 1 if shots is None else shots
    with monkeypatch.context() as patch:
        patch.setattr("llmkit.evaluation.runner.open_engine", refuse)
        shown = preview(model, Selection(bench, data / bench, protocol=protocol, shots=shots, limit=2))
    sent = set()
    score, generate = Scorer.score, Scorer.generate

    def scored(self, queries, *args):
        sent.update((q.tokens[: q.first + 1], q.targets) for q in queries)
        return score(self, queries, *args)

    def generated(self, requests, *args):
        sent.update((r.tokens, ()) for r in requests)
        short = [type(r)(r.index, r.tokens, r.stops, 2, r.sampling) for r in requests]
        return generate(self, short, *args)

    monkeypatch.setattr(Scorer, "score", scored)
    monkeypatch.setattr(Scorer, "generate", generated)
    record = evaluate(model, bench, data=data / bench, protocol=protocol, shots=shots, limit=2)
    questions = [(s.name, q) for s in record.benches[bench].subjects for q in s.questions]
    assert [(p.subject, p.id, p.prompt) for p in shown] == [(s, q.id, q.prompt) for s, q in questions]
    assert len(shown) == 4
    for prompt in shown:
        assert all((prompt.ids, choice) in sent for choice in prompt.choices or [()])
        assert f"{prompt.subject} " in prompt.text


def test_the_command(model, data, capsys):
    from llmkit.cli.app import main

    line = ["eval", str(model), "--bench", "cmmlu", "--data", str(data), "--subjects", "logical", "--show", "1"]
    assert main([*line, "--shots", "1", "--json"]) == 0
    (prompt,) = json.loads(capsys.readouterr().out)["prompts"]
    assert (prompt["bench"], prompt["subject"], prompt["id"]) == ("cmmlu", "logical", "0")
    assert prompt["answer_at"] == len(prompt["ids"])
    assert len(prompt["choices"]) == 4
    assert main([*line, "--shots", "1"]) == 0
    text = capsys.readouterr().out
    assert "以下是关于逻辑学的单项选择题，请直接给出正确答案的选项。" in text
    assert " ".join(map(str, prompt["ids"])) in text
    assert prompt["prompt"] in text
    assert main([*line, "-o", "run.json"]) == 2
    assert "--output is not for --show" in capsys.readouterr().err


def test_what_cannot_be_scored_cannot_be_shown(model, data):
    with pytest.raises(InputError, match="no subject or category 'logicall'"):
        preview(model, Selection("cmmlu", data / "cmmlu", subjects=["logicall"]))
