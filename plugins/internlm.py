"""InternLM 1 to 3 (Shanghai AI Laboratory 2023 to 2025): Llama's layers, in InternLM 2's own names.

Source: modeling_internlm.py and modeling_internlm2.py of the repositories (internlm). Outputs of both are recorded in
tests/golden; transformers' Llama is the same model (`equivalents`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import GatedMLP, GroupedQuery, RMSNorm, Rope
from llmkit.architecture.names import Fused, Names
from llmkit.architecture.scaling import DynamicNTK, NoScaling, Scaling, UnknownScaling

from .llama import ARCHITECTURE as LLAMA
from .llama import BLOCK, GGUF, TINY
from .llama_alikes import alike, as_llama

_BIAS = Key("bias", True)


def _with_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    return as_llama(config, "bias", attention_bias=config.get("bias", True))


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the code of autumn 2023 adds to the config: a base that grows past the context it was trained with."""
    return {"type": "dynamic", "base": 10000, "scaling_factor": 1.0} | dict(config.get("rotary") or {})


def _scaling(config: Mapping[str, Any]) -> Scaling:
    rotary = _rotary(config)
    if rotary["type"] != "dynamic":
        return NoScaling() if rotary["type"] == "origin" else UnknownScaling(rotary["type"])
    return DynamicNTK(float(rotary["scaling_factor"]), config.get("max_position_embeddings", 2048))


def _of_1(config: Mapping[str, Any]) -> dict[str, Any]:
    rotary = _rotary(config)
    bias, base = config.get("bias", True), float(rotary["base"])
    llama = as_llama(config, "bias", "rotary", attention_bias=bias, rope_theta=base)
    scaling = {"type": "dynamic", "factor": float(rotary["scaling_factor"])}
    return llama | ({"rope_scaling": scaling} if rotary["type"] == "dynamic" else {})


_QKV_BIAS = Key(("qkv_bias", "attention_bias"), False)
_OUT_BIAS = Key(("bias", "mlp_bias"), False)


def _of_3(config: Mapping[str, Any]) -> dict[str, Any]:
    biases = {"attention_bias": lookup(_QKV_BIAS, config), "mlp_bias": lookup(_OUT_BIAS, config)}
    llama = as_llama(config, "bias", "qkv_bias", **biases)
    return {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5} | llama


_BLOCK = replace(BLOCK, attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS))

INTERNLM = alike(
    "internlm",
    ("InternLM-7B", "InternLM-20B"),
    ("InternLMForCausalLM",),
    "internlm",
    _of_1,
    block=replace(_BLOCK, position=Rope(theta=Key("rotary.base", 10000.0), scaling=Computed(_scaling))),
    tiny={k: v for k, v in TINY.items() if k != "rope_theta"},
    variants={"20b": {"bias": False, "rotary": {"base": 20000, "type": "dynamic"}, "max_position_embeddings": 24}},
)
INTERNLM2 = alike(
    "internlm2",
    ("InternLM2", "InternLM2.5"),
    ("InternLM2ForCausalLM",),
    "internlm2",
    _with_biases,
    block=_BLOCK,
    names=Names(
        embed="model.tok_embeddings",
        final_norm="model.norm",
        head="output",
        block="model.layers.{i}.",
        slots={
            "attn_norm": "attention_norm",
            "attn.qkv": Fused("attention.wqkv", ("q", "k", "v"), rows="per_group"),
            "attn.o": "attention.wo",
            "mlp_norm": "ffn_norm",
            "mlp.gate": "feed_forward.w1",
            "mlp.up": "feed_forward.w3",
            "mlp.down": "feed_forward.w2",
        },
        ignored=("*.rotary_emb.inv_freq",),
    ),
    reference_config=None,
    # No biases there.
    gguf=replace(GGUF, arch="internlm2", flags={}, config={**GGUF.config, "bias": False}, has_own_head=True),
    tiny={**TINY, "rms_norm_eps": 1e-5, "bias": False},
    variants={"biases": {"bias": True}, "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
)
# transformers takes one key for the biases of attention, the original code the other for its output.
INTERNLM3 = alike(
    "internlm3",
    ("InternLM3-8B",),
    ("InternLM3ForCausalLM",),
    "internlm3",
    _of_3,
    dims=replace(LLAMA.dims, kv_heads=Key("num_key_value_heads", 2), head_dim=Key("head_dim", 128)),
    block=replace(
        _BLOCK,
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(qkv_bias=_QKV_BIAS, out_bias=_OUT_BIAS),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=_OUT_BIAS),
    ),
    tiny={**TINY, "rms_norm_eps": 1e-5, "head_dim": 16, "qkv_bias": False, "bias": False},
    variants={"biases": {"qkv_bias": True, "bias": True}},
)
