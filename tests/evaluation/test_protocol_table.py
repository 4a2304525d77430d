"""Every protocol of every benchmark: shots, limits, subjects, chat formats, backends, quantized weights, shards."""

from __future__ import annotations

import pytest
import torch
from small_benchmarks import SUBJECTS, write_benchmarks

import llmkit
from llmkit.errors import InputError
from llmkit.evaluation.benches import load_bench
from llmkit.evaluation.protocol import protocol_named, protocol_names
from llmkit.evaluation.scoring import Scorer
from llmkit.evaluation.shards import Shard
from llmkit.transforms.quantize import quantize
from tests.evaluation.running import evaluate

SCORED = {"mmlu": "test", "ceval": "val", "cmmlu": "test", "mini": "test"}
TABLE = [(bench, protocol) for bench in SUBJECTS for protocol in protocol_names(bench)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("data"), lambda bench: ("dev", SCORED[bench]))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A few tokens, however long a protocol lets answers grow."""
    generate = Scorer.generate

    def few(self, requests, *args):
        short = [type(r)(r.index, r.tokens, r.stops, min(r.max_new, 2), r.sampling) for r in requests]
        return generate(self, short, *args)

    monkeypatch.setattr(Scorer, "generate", few)


def questions(record, bench):
    return {(s.name, q.id): (q.choice, q.prompt) for s in record.benches[bench].subjects for q in s.questions}


@pytest.mark.parametrize(("bench", "protocol"), TABLE)
def test_a_protocol_in_all_circumstances(model, data, tmp_path, bench, protocol):
    usual = protocol_named(load_bench(bench), protocol).shots
    options = {"data": data / bench, "protocol": protocol, "shots": 0 if usual == 0 else 1}
    whole = evaluate(model, bench, **options)
    result = whole.benches[bench]
    assert (len(questions(whole, bench)), result.protocol, result.n_truncated) == (6, protocol, 0)
    assert all(len(q.prompt) == 16 for s in result.subjects for q in s.questions)

    bare = evaluate(model, bench, **options | {"shots": 0, "limit": 0.5, "subjects": [SUBJECTS[bench][1]]})
    assert set(questions(bare, bench)) == {(SUBJECTS[bench][1], "0"), (SUBJECTS[bench][1], "1")}
    same = {k: v for k, v in questions(bare, bench).items() if questions(whole, bench)[k] == v}
    assert len(same) == (2 if usual == 0 else 0)

    parts = [evaluate(model, bench, shard=Shard(i, 2), **options) for i in (1, 2)]
    assert questions(parts[0], bench) | questions(parts[1], bench) == questions(whole, bench)
    assert {p.benches[bench].task_digest for p in parts} == {result.task_digest}

    other = evaluate(model, bench, backend="transformers", **options)
    assert questions(other, bench) == questions(whole, bench)

    keep = tmp_path / "run.json.answers"
    assert questions(evaluate(model, bench, keep=keep, **options), bench) == questions(whole, bench)
    resumed = evaluate(model, bench, keep=keep, **options)
    assert questions(resumed, bench) == questions(whole, bench)
    assert resumed.n_reused > 0


@pytest.mark.parametrize(("bench", "protocol"), TABLE)
def test_a_protocol_in_a_chat_format(model, data, bench, protocol):
    known = protocol_named(load_bench(bench), protocol)
    options = {"data": data / bench, "protocol": protocol, "shots": 0 if known.shots == 0 else 1}
    plain = questions(evaluate(model, bench, **options), bench)
    if not getattr(known, "has_chat", True):
        with pytest.raises(InputError, match="its authors define no chat format for it"):
            evaluate(model, bench, chat_template="vicuna", **options)
        return
    chat = questions(evaluate(model, bench, chat_template="vicuna", **options), bench)
    assert chat.keys() == plain.keys()
    assert not {p for _, p in chat.values()} & {p for _, p in plain.values()}


def test_a_quantized_checkpoint(model, data, tmp_path):
    llmkit.save(quantize(llmkit.open_checkpoint(model), bits=8), tmp_path / "int8")
    for bench, protocol in (("mmlu", "original"), ("ceval", "official"), ("cmmlu", "official")):
        told: list[str] = []
        options = {"data": data / bench, "protocol": protocol, "shots": 1, "tell": told.append}
        floats, codes = (questions(evaluate(m, bench, **options), bench) for m in (model, tmp_path / "int8"))
        assert [line.partition(": ")[2] for line in told if "is quantized" in line] == [
            "computed with its weights dequantized to float32, once"
        ]
        assert {k: p for k, (_, p) in floats.items()} == {k: p for k, (_, p) in codes.items()}


@pytest.mark.parametrize("has_products", [False, True])
def test_a_dtype_that_the_processor_emulates_is_told(model, data, monkeypatch, has_products):
    capabilities = {"architecture": "x86_64", "avx512_bf16": has_products}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for dtype in ("bfloat16", "float32"):
        told: list[str] = []
        options = {"data": data / "mmlu", "shots": 0, "limit": 1, "tell": told.append}
        evaluate(model, "mmlu", dtype=dtype, **options)
        found = any("this processor has no products of bfloat16: --dtype float32" in line for line in told)
        assert found == (dtype == "bfloat16" and not has_products)
