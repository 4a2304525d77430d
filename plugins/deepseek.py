"""DeepSeek-V2 and V3, and what is stored as they are: DeepSeek-R1, Moonlight, Kimi K2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, Head, RMSNorm, Rope
from llmkit.architecture.latent import LatentAttention, latent_sizes
from llmkit.architecture.names import Fused

from .llama import DIMS as _DIMS
from .llama import NAMES as _NAMES

_BIAS = Key("attention_bias", False)
DIMS = replace(
    _DIMS, kv_heads=Key((), None), head_dim=Key("qk_rope_head_dim", 64), extra=latent_sizes()
)
LATENT_SLOTS = {
    "attn.q_a": "self_attn.q_a_proj",
    "attn.q_a_norm": "self_attn.q_a_layernorm",
    "attn.q_b": "self_attn.q_b_proj",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "attn.kv_b": Fused("self_attn.kv_b_proj", ("k_b", "v_b"), rows="per_group"),
}
NAMES = replace(_NAMES, slots={k: v for k, v in _NAMES.slots.items() if k not in ("attn.k", "attn.v")} | LATENT_SLOTS)
TINY: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "first_k_dense_replace": 2,
}

DEEPSEEK_V2 = Architecture(
    name="deepseek2",
    releases=("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-Coder-V2"),
    matches=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    dims=DIMS,
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=LatentAttention(bias=_BIAS),
        position=Rope(pairs="interleaved"),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
    ),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=NAMES,
    tiny=TINY,
    variants={
        "plain-queries": {"q_lora_rank": None, "attention_bias": True},
        "yarn": {
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
                "mscale": 1.0, "mscale_all_dim": 0.8,
            },
        },
    },
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    name="deepseek3",
    releases=("DeepSeek-V3", "DeepSeek-R1"),
    matches=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3",),
    tiny={**TINY, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
)
