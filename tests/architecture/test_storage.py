"""Weights in and out of stored tensors: fused, grouped, transposed; against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.architecture.names import Fused, Transposed
from llmkit.architecture.registry import default_registry
from llmkit.architecture.storage import rotary_pairs, tensors_of, weights_of
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import SpecError
from llmkit.pipeline.plan import slice_rows
from llmkit.tensors.lazy import Context

LLAMA = next(default_registry().load(p) for p in default_registry().plugins if p.name == "llama")
QKV = ("q", "k", "v")


def spelled(**entries):
    """The family's model with some entries of its name table replaced."""
    names = LLAMA.names
    gone = {"attn.qkv": {"attn.q", "attn.k", "attn.v"}, "mlp.both": {"mlp.gate", "mlp.up"}}
    slots = {k: v for k, v in names.slots.items() if not any(k in gone.get(e, ()) for e in entries)}
    return replace(names, slots=slots | entries)


def sliced(lazy, nbytes):
    """As the runner computes it: in row slices."""
    context = Context()
    rows = slice_rows(lazy.node, nbytes)
    return torch.cat([context.rows(lazy, r) for r in rows]) if lazy.shape else lazy.load()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_rows(kv_heads):
    """per_group: for each key/value head its queries, its key, its value, as `view(kv, n/kv + 2, head_dim)` has it."""
    config = LLAMA.tiny_config() | {"num_key_value_heads": kv_heads}
    model = LLAMA.bind(config)
    weights = weights_of(random_checkpoint(LLAMA, config).tensors, model)
    fused = model.spelled(spelled(**{"attn.qkv": Fused("att.mix", QKV, "per_group")}))
    stored = tensors_of(weights, fused)
    q, k, v = (weights[f"layers.1.attn.{p}.weight"].load() for p in QKV)
    grouped = [q.view(kv_heads, 4 // kv_heads, 8, 32), k.view(kv_heads, 1, 8, 32), v.view(kv_heads, 1, 8, 32)]
    wanted = torch.cat(grouped, 1).reshape(-1, 32)
    assert torch.equal(stored["model.layers.1.att.mix.weight"].load(), wanted)
    assert fused.check({n: t.spec for n, t in stored.items()}).is_ok
    assert fused.tensors()["model.layers.1.att.mix.weight"].id == "layers.1.attn.qkv.weight"
    assert fused.name_of("layers.1.attn.k.weight") == "model.layers.1.att.mix.weight"


def test_stacked_and_transposed():
    config = LLAMA.tiny_config()
    model = LLAMA.bind(config)
    weights = weights_of(random_checkpoint(LLAMA, config).tensors, model)
    entries = {
        "attn.qkv": Transposed(Fused("c_attn", QKV)),
        "mlp.both": Fused("gate_up", ("gate", "up")),
        "mlp.down": Transposed("c_proj"),
    }
    other = model.spelled(spelled(**entries))
    stored = tensors_of(weights, other)
    parts = [weights[f"layers.0.attn.{p}.weight"].load() for p in QKV]
    assert torch.equal(stored["model.layers.0.c_attn.weight"].load(), torch.cat(parts).t())
    assert torch.equal(stored["model.layers.0.c_proj.weight"].load(), weights["layers.0.mlp.down.weight"].load().t())
    both = torch.cat([weights[f"layers.0.mlp.{p}.weight"].load() for p in ("gate", "up")])
    assert torch.equal(stored["model.layers.0.gate_up.weight"].load(), both)


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    layout=st.sampled_from(["stacked", "per_group"]),
    is_transposed=st.booleans(),
    pairs=st.sampled_from(["half", "interleaved"]),
    nbytes=st.sampled_from([64, 512, 2**20]),
)
def test_there_and_back(kv_heads, layout, is_transposed, pairs, nbytes):
    config = LLAMA.tiny_config() | {"num_key_value_heads": kv_heads, "attention_bias": True}
    model = LLAMA.bind(config)
    ckpt = random_checkpoint(LLAMA, config)
    entry = Fused("mix", QKV, layout)
    other = model.spelled(spelled(**{"attn.qkv": Transposed(entry) if is_transposed else entry}))
    away = tensors_of(rotary_pairs(weights_of(ckpt.tensors, model), model, to=pairs), other)
    back_order = {"half": "interleaved", "interleaved": "half"}[pairs]
    back = tensors_of(rotary_pairs(weights_of(away, other), model, to=back_order), model)
    assert list(back) == list(ckpt.tensors)
    for name, lazy in ckpt.tensors.items():
        assert torch.equal(sliced(back[name], nbytes), lazy.load()), name


def test_rotary_pairs_is_the_published_permutation():
    """Meta's order to transformers': view(n, D/2, 2, in).transpose(1, 2), as convert_llama_weights_to_hf states it."""
    config = LLAMA.tiny_config()
    model = LLAMA.bind(config)
    weights = weights_of(random_checkpoint(LLAMA, config).tensors, model)
    turned = rotary_pairs(weights, model, to="half")
    k = weights["layers.0.attn.k.weight"].load()
    wanted = k.view(2, 4, 2, 32).transpose(1, 2).reshape(16, 32)
    assert torch.equal(turned["layers.0.attn.k.weight"].load(), wanted)
    assert turned["layers.0.attn.v.weight"] is weights["layers.0.attn.v.weight"]


def test_what_does_not_fit_is_refused():
    model = LLAMA.bind(LLAMA.tiny_config())
    tensors = dict(random_checkpoint(LLAMA, LLAMA.tiny_config()).tensors)
    weights = weights_of(tensors, model)
    with pytest.raises(SpecError, match=r"lacks layers\.0\.attn\.q\.weight"):
        tensors_of({k: v for k, v in weights.items() if k != "layers.0.attn.q.weight"}, model)
    with pytest.raises(SpecError, match=r"no place for layers\.0\.attn\.q\.bias"):
        tensors_of(weights | {"layers.0.attn.q.bias": weights["final_norm.weight"]}, model)
    del tensors["model.norm.weight"]
    with pytest.raises(SpecError, match="do not fit the config"):
        weights_of(tensors, model)
