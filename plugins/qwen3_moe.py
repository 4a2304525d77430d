"""Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder: Qwen3's attention, eight of 128 small experts for each token."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GroupedQuery, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import window_of

from .llama import DIMS, TINY
from .qwen2 import WINDOW_KEYS
from .qwen2_moe import ACT, EXPERTS, mlp_of
from .qwen3 import ARCHITECTURE as QWEN3

_EPS = Key("rms_norm_eps", 1e-6)
_BIAS = Key("attention_bias", False)


def _block(config: Mapping[str, Any], i: int) -> Block:
    router = Router(
        count=Key(("num_local_experts", "num_experts"), 128),
        top_k=Key("num_experts_per_tok", 8),
        is_normalized=Key("norm_topk_prob", False),
    )
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            window=window_of(config, 4096) if config.get("use_sliding_window") else None,
            qk_norm=RMSNorm(eps=_EPS, width="head_dim"),
        ),
        position=Rope(),
        mlp=mlp_of(config, i, Experts(ACT, router=router)),
    )


ARCHITECTURE = Architecture(
    name="qwen3_moe",
    releases=("Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder"),
    matches=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    dims=replace(DIMS, extra={"expert_ffn": Key("moe_intermediate_size", 768)}),
    block=PerLayer(_block),
    names=replace(QWEN3.names, slots={**QWEN3.names.slots, **EXPERTS}),
    # llama.cpp divides the weights by their sum, as all published models want it.
    gguf=GgufFamily("qwen3moe", config={"use_sliding_window": False, "norm_topk_prob": True}),
    unused=(*WINDOW_KEYS, "output_router_logits"),
    optimum_reads={"qwen3_moe": ("kv_heads",)},
    tiny={
        **TINY,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "eos_token_id": 2,
    },
    variants={
        "dense-below": {"norm_topk_prob": False, "decoder_sparse_step": 2, "head_dim": None},
        "window": {"use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
        "transformers-5": {
            "num_experts": None,
            "num_local_experts": 8,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
            "tie_word_embeddings": True,
        },
    },
)
