"""dots.llm1: Qwen3's attention, DeepSeek-V3's experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Router
from llmkit.architecture.gguf import GgufFamily, needs_all_heads, needs_experts
from llmkit.architecture.gguf_experts import DENSE_FIRST_KEYS, dense_first_metadata
from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, Kind, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.model import Model

from .deepseek2 import ACTIVATION, EXPERT_SLOTS, mixture
from .deepseek3 import ROUTER
from .llama import DIMS, TINY
from .qwen3 import ARCHITECTURE as QWEN3

_EPS, _BIAS = Key("rms_norm_eps", 1e-6), Key("attention_bias", False)
_ROUTER: Router = replace(
    ROUTER,
    count=Key("n_routed_experts"),
    top_k=Key("num_experts_per_tok"),
    is_normalized=Key("norm_topk_prob", False),
    scale=Key("routed_scaling_factor", 1.0),
    groups=Key("n_group", 1),
    top_groups=Key("topk_group", 1),
)


def _block(config: Mapping[str, Any], i: int) -> Block:
    first = lookup(Key("max_window_layers", 62), config)
    window = window_of(config, 4096)
    is_dense = i < lookup(Key("first_k_dense_replace", 0), config)
    mlp: Kind = GatedMLP(ACTIVATION) if is_dense else mixture(config, _ROUTER)
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            window=window if is_sliding(config, i, lambda i: window is not None and i >= first) else None,
            qk_norm=RMSNorm(eps=_EPS, width="head_dim"),
        ),
        position=Rope(),
        mlp=mlp,
    )


def _refuses(model: Model) -> str | None:
    return needs_all_heads(model) or needs_experts(model)


ARCHITECTURE = Architecture(
    name="dots1",
    releases=("dots.llm1",),
    matches=("Dots1ForCausalLM",),
    model_types=("dots1",),
    dims=replace(DIMS, extra={"expert_ffn": Key("moe_intermediate_size", 1408)}),
    block=PerLayer(_block),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=replace(QWEN3.names, slots={**QWEN3.names.slots, **EXPERT_SLOTS}),
    fixed={"moe_layer_freq": 1},
    unused=(
        "sliding_window",  # where no layer has one
        "max_window_layers", "output_router_logits", "topk_method", "scoring_func", "use_sliding_window",
    ),
    gguf=GgufFamily(
        "dots1",
        keys=DENSE_FIRST_KEYS,
        config={"hidden_act": "silu", "sliding_window": None},
        write=lambda model, _: dense_first_metadata(model),
        refuses=_refuses,
        has_own_head=True,
    ),
    tiny={
        **TINY, "num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": 6, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "sliding_window": None, "rms_norm_eps": 1e-6,
    },
    variants={
        "groups": {"n_group": 3, "topk_group": 2, "n_shared_experts": 2, "attention_bias": True,
                   "tie_word_embeddings": True},
        "window": {"sliding_window": 7, "max_window_layers": 1, "num_key_value_heads": 2, "head_dim": None,
                   "norm_topk_prob": False},
    },
)  # fmt: skip
