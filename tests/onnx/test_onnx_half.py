"""Half precision: every family's graph computes in float16 on the CPU; the judge is the torch decoder in float32."""

from __future__ import annotations

import pytest
import torch

from llmkit.architecture.deltanet import GatedDeltaNet
from llmkit.architecture.experts import Router
from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx.model import build_graph
from llmkit.onnx.parity import TOLERANCES, compare_decoders

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
from rotation import rotated
from tiny_graphs import PLUGINS, decoder_of, is_refused, made

OPS = ("attention", "gqa")
# Each family in one op at least: in the other one where an op cannot compute it.
TABLE = dict.fromkeys((n, OPS[0] if is_refused(n, op) else op) for n, op in rotated(PLUGINS, OPS))
SEEDS = {"phimoe": 3}  # weights with which no token lies between two experts: two are chosen whatever the config says


def steady(name):
    """Changes of a tiny config after which rounding moves logits by little; without them by any amount.

    Every expert is chosen, as a token between two may go to either. A gated delta rule gives next to nothing where key
    and query are at right angles, and the norm that follows magnifies what rounding made of that: in the original too.
    """
    tiny = PLUGINS[name].tiny_config()
    model = PLUGINS[name].bind(tiny)
    has_rule = any(isinstance(getattr(b, "attention", None), GatedDeltaNet) for b in model.blocks)
    changes = {"rms_norm_eps": 1e-4} if has_rule else {}
    for router in routers(model):
        keys = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
        changes |= dict.fromkeys([k for k in keys if k in tiny] or keys[-1:], router.n_experts)
        changes |= {"topk_group": tiny["n_group"]} if "n_group" in tiny else {}
    return changes


def routers(model):
    found = (getattr(getattr(block, "mlp", None), "router", None) for block in model.blocks)
    return [router for router in found if isinstance(router, Router)]


@pytest.mark.parametrize(("name", "attention"), TABLE)
def test_float16_logits(name, attention):
    changes, seed = steady(name), SEEDS.get(name, 0)
    found, wanted, ends = made(name, attention=attention, dtype="FLOAT16", changes=changes, seed=seed)
    assert all(router.n_chosen == router.n_experts for router in routers(wanted.model))
    worst = {d.case: d.largest for d in compare_decoders(found, wanted, suffix=ends)}
    assert all(1e-6 < x <= TOLERANCES["float16"] for x in worst.values()), worst


@pytest.mark.parametrize("name", ["deepseek3", "gpt_oss", "phimoe", "qwen2_moe"])
def test_choices_of_experts(name):
    """Most prompts lie clearly on one side: their experts are those that float32 chooses."""
    found, wanted, _ = made(name, dtype="FLOAT16")
    ids = torch.randint(0, wanted.model.dims.vocab, (32, 4), generator=torch.Generator().manual_seed(4))
    largest = (found(ids) - wanted(ids)).abs().amax((1, 2)) / wanted(ids).abs().max()
    assert (largest <= TOLERANCES["float16"]).float().mean() > 0.8


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
