"""Qwen 1 (Alibaba 2023; `QWenLMHeadModel`): Llama's layers with biases on q, k and v, and two devices for long texts.

A prompt longer than the model was trained with gets a larger rotary base, in steps, which the tokens after it keep; and
queries past that length are multiplied by the logarithm of their place. Source: modeling_qwen.py (Qwen/Qwen-7B), whose
outputs are recorded in tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Kind, RMSNorm, Rope
from llmkit.architecture.model import Model
from llmkit.architecture.names import Fused, Names
from llmkit.architecture.prompts import FORMATS
from llmkit.architecture.scaling import NoScaling

from .positions import LongRope
from .tokenizer import TOKENIZER


def _position(config: Mapping[str, Any]) -> Kind:
    """Without the two devices Llama's positions, which other architectures have as well."""
    plain = Rope(theta=Key("rotary_emb_base", 10000.0), scaling=NoScaling(), share=Key("rotary_pct", 1.0))
    grows, scales = Key("use_dynamic_ntk", True), Key("use_logn_attn", True)
    if not lookup(grows, config) and not lookup(scales, config):
        return plain
    return LongRope(plain.theta, plain.scaling, plain.share, plain.pairs, Key("seq_length"), grows, scales)


def _as_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings")
    return {k: v for k, v in config.items() if k in same or k.endswith(("_token_id", "_dtype"))} | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"] // 2,
        "max_position_embeddings": config["seq_length"],
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(config.get("rotary_emb_base", 10000)),
        "hidden_act": "silu",
    }


def _metadata(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"feed_forward_length": 2 * model.dims.ffn}


_HAS_BIASES = Computed(lambda config: not lookup(Key("no_bias", True), config))

_TINY = {
    "kv_channels": 8, "intermediate_size": 96, "seq_length": 64, "max_position_embeddings": 64,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True, "use_dynamic_ntk": True,
    "use_logn_attn": True, "tie_word_embeddings": False,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="qwen",
    releases=("Qwen-1.8B", "Qwen-7B", "Qwen-14B", "Qwen-72B"),
    matches=("QWenLMHeadModel",),
    model_types=("qwen",),
    dims=Dims(
        kv_heads=DERIVED,
        head_dim=Key("kv_channels", 128),
        ffn=Computed(lambda config: config["intermediate_size"] // 2),
        context="seq_length",
    ),
    equivalents={"qwen2": _as_qwen2},
    block=Block(
        norm=RMSNorm(eps=Key("layer_norm_epsilon", 1e-6)),
        attention=GroupedQuery(qkv_bias=True, out_bias=_HAS_BIASES),
        position=Computed(_position),
        mlp=GatedMLP("silu", bias=_HAS_BIASES),
    ),
    fixed={"scale_attn_weights": True},
    unused=("bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32", "use_cache_*", "params_dtype", "*_prob"),
    prompt=FORMATS["qwen-chat"],
    tokenizer=TOKENIZER,
    names=Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={
            "attn_norm": "ln_1",
            "attn.qkv": Fused("attn.c_attn", ("q", "k", "v")),
            "attn.o": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.gate": "mlp.w2",
            "mlp.up": "mlp.w1",
            "mlp.down": "mlp.c_proj",
        },
        ignored=("*.attn.masked_bias", "*.rotary_emb.inv_freq"),
    ),
    # llama.cpp computes it as if no text were longer than the model was trained with.
    gguf=GgufFamily(
        "qwen",
        slots={"attn.qkv": QKV},
        keys={
            "context_length": "seq_length",
            "attention.head_count_kv": "",
            "attention.key_length": "kv_channels",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "rope.freq_base": "rotary_emb_base",
        },
        read=lambda metadata: {"kv_channels": metadata["embedding_length"] // metadata["attention.head_count"]},
        write=_metadata,
        config={"no_bias": True, "use_dynamic_ntk": False, "use_logn_attn": False},
        noted=("use_dynamic_ntk", "use_logn_attn"),
        has_own_head=True,
    ),
    tiny=_TINY,
    variants={"short": {"seq_length": 10}, "plain": {"use_dynamic_ntk": False, "use_logn_attn": False}},
)
