"""StableLM-3B-4E1T, StableLM-2, StableLM-Zephyr: Llama's layers with LayerNorm, rotary positions on part of a head.

StableLM-2-12B has attention and MLP side by side, and norms of their own for all heads of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import DERIVED, HIDDEN_PER_HEAD, Architecture, Dims
from llmkit.architecture.gguf import GgufFamily, rotary_share
from llmkit.architecture.keys import Computed, Key, respelled
from llmkit.architecture.kinds import (
    Block,
    GatedMLP,
    GroupedQuery,
    HeadNorm,
    LayerNorm,
    PreNorm,
    Rope,
    SharedParallel,
    rotated_share,
)

from .llama import NAMES, TINY

# The second spellings are those of the repositories' own code, before transformers had the class.
_EPS = Key(("layer_norm_eps", "norm_eps"), 1e-5)
_TODAY = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
_SHARE = rotated_share(0.25, "rope_pct")


def _head_norm(heads: str) -> Computed:
    def norm(config: Mapping[str, Any]) -> HeadNorm | None:
        n_heads = config.get(heads) or config["num_attention_heads"]
        return HeadNorm(_EPS, str(n_heads), is_apart=True) if config.get("qk_layernorm") else None

    return Computed(norm)


ARCHITECTURE = Architecture(
    name="stablelm",
    releases=("StableLM-3B-4E1T", "StableLM-Zephyr-3B", "StableLM-2-1.6B", "StableLM-2-12B"),
    matches=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    model_types=("stablelm", "stablelm_epoch"),
    reference_config=lambda config: respelled(config, "StableLmForCausalLM", "stablelm", _TODAY),
    dims=Dims(head_dim=DERIVED),
    block=Block(
        norm=LayerNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=Key("use_qkv_bias", False),
            qk_norm=_head_norm("num_attention_heads"),
            k_norm=_head_norm("num_key_value_heads"),
        ),
        position=Rope(share=_SHARE),
        mlp=GatedMLP(Key("hidden_act", "silu")),
        residual=Computed(lambda config: SharedParallel() if config.get("use_parallel_residual") else PreNorm()),
    ),
    fixed={
        "rotary_scaling_factor": 1.0,
        "head_dim": HIDDEN_PER_HEAD,
    },
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            "attn.q_norm": "self_attn.q_layernorm.norms",
            "attn.k_norm": "self_attn.k_layernorm.norms",
        },
    ),
    gguf=GgufFamily(
        "stablelm",
        stacked=("attn_q_norm", "attn_k_norm"),
        keys={"use_parallel_residual": "use_parallel_residual"},
        config={"hidden_act": "silu"},
        flags={"use_qkv_bias": "blk.0.attn_q.bias", "qk_layernorm": "blk.0.attn_q_norm.weight"},
        read=lambda metadata: {"partial_rotary_factor": rotary_share(metadata)},
        write=lambda _, config: {"use_parallel_residual": bool(config.get("use_parallel_residual"))},
        has_own_head=True,
        tokenizer_pre="stablelm2",
    ),
    optimum_reads={"stablelm": ("kv_heads",)},
    tiny={
        **TINY,
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    variants={
        "2-1.6b": {"use_qkv_bias": True},
        "2-12b": {"num_key_value_heads": 2, "qk_layernorm": True, "use_parallel_residual": True},
        "head-norms-multi-query": {"num_key_value_heads": 1, "qk_layernorm": True},
        "parallel": {"use_parallel_residual": True},
        "defaults": {"partial_rotary_factor": None, "layer_norm_eps": None, "rope_theta": None},
        "first-files": {
            "architectures": ["StableLMEpochForCausalLM"],
            "model_type": "stablelm_epoch",
            "layer_norm_eps": None,
            "norm_eps": 1e-4,
            "partial_rotary_factor": None,
            "rope_pct": 0.5,
        },
        "tied": {"tie_word_embeddings": True},
        "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "transformers-5": {
            "rope_theta": None,
            "partial_rotary_factor": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
        },
    },
)
