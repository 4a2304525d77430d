"""Qwen3: Qwen2's without biases, with a norm on each head of queries and keys."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, PerLayer, RMSNorm, Rope

from .llama import DIMS, NAMES, TINY
from .qwen2 import WINDOW_KEYS, window

_EPS = Key("rms_norm_eps", 1e-6)
_BIAS = Key("attention_bias", False)


def _block(config: Mapping[str, Any], i: int) -> Block:
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=_BIAS, out_bias=_BIAS, window=window(config, i), qk_norm=RMSNorm(eps=_EPS, width="head_dim")
        ),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
    )


ARCHITECTURE = Architecture(
    name="qwen3",
    releases=("Qwen3 (dense)",),
    matches=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    dims=replace(DIMS, head_dim=Key("head_dim", 128)),
    block=PerLayer(_block),
    unused=WINDOW_KEYS,
    names=replace(NAMES, slots={**NAMES.slots, "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}),
    gguf=GgufFamily("qwen3", config={"use_sliding_window": False}),
    optimum_reads={"qwen3": ("kv_heads",)},
    tiny={
        **TINY,
        "head_dim": 16,
        "max_window_layers": 1,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 7,
        "use_sliding_window": False,
        "eos_token_id": 2,
    },
    variants={
        "tied": {"tie_word_embeddings": True},
        "head-dim-default": {"head_dim": None},
        "attention-bias": {"attention_bias": True},
        "window-above": {"use_sliding_window": True},
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        "transformers-5": {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_window_layers": None,
        },
    },
)
