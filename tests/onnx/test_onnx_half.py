"""Half precision: every family's graph computes in float16 on the CPU; the judge is the torch decoder in float32."""

from __future__ import annotations

import pytest
import torch

from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx.model import build_graph
from llmkit.onnx.parity import TOLERANCES, compare_decoders

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
from tiny_graphs import PLUGINS, decoder_of, made


@pytest.mark.parametrize("attention", ["attention", "gqa"])
@pytest.mark.parametrize("name", PLUGINS)
def test_float16_logits(name, attention):
    found, wanted, ends = made(name, attention=attention, dtype="FLOAT16")
    worst = {d.case: d.largest for d in compare_decoders(found, wanted, suffix=ends)}
    assert all(1e-6 < x <= TOLERANCES["float16"] for x in worst.values()), worst


def test_what_runs_from_call_to_call_is_half_too():
    found, _, _ = made("llama", dtype="FLOAT16")
    kinds = {i.name.partition(".")[0]: i.type for i in found.parts.body.session.get_inputs()}
    assert kinds["past_key_values"] == "tensor(float16)"
    assert found.parts.outputs["logits"].dtype == "float32"  # logits


def test_biases_of_far_keys_stay_exact_near_the_query():
    """ALiBi grows with the position: beyond 2048 float16 counts in twos, which would blur the nearest keys."""
    found, wanted, _ = made("bloom", dtype="FLOAT16")
    ids = torch.randint(0, 90, (1, 2200), generator=torch.Generator().manual_seed(2))
    assert float((found(ids)[:, -50:] - wanted(ids)[:, -50:]).abs().max()) < 5e-3


@pytest.mark.parametrize("attention", ["attention", "gqa"])
def test_no_score_reaches_what_is_hidden(attention):
    """Some models have scores in the hundreds. Padding stays hidden beside them, and a row of padding finite."""
    architecture = PLUGINS["llama"]
    config = architecture.tiny_config()
    ckpt, model = random_checkpoint(architecture, config), architecture.bind(config)

    def data_of(name, lazy):
        return (lazy.load() * (40 if "q_proj" in name else 1)).numpy().tobytes()

    found = decoder_of(build_graph(model, ckpt.tensors, data_of, attention=attention, dtype="FLOAT16"), model)
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = found(ids, mask=mask)
    assert bool(logits.isfinite().all())
    others = ids.clone()
    others[0, :5] = torch.tensor([80, 3, 44, 7, 61])
    assert torch.equal(found(others, mask=mask)[0, 5:], logits[0, 5:])
