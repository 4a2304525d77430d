"""GLM-4.5 and its followers: after the first layers experts, chosen by sigmoids with a correction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Router
from llmkit.architecture.gguf import GgufFamily, Metadata, needs_experts, rotary_share
from llmkit.architecture.gguf_experts import DENSE_FIRST_KEYS, dense_first_metadata
from llmkit.architecture.keys import Key, as_bool, lookup
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, PerLayer, RMSNorm, Rope, rotated_share

from .deepseek2 import ACTIVATION, EXPERT_SLOTS, mixture
from .deepseek3 import ROUTER
from .llama import DIMS, NAMES, QK_NORMS, TINY

_EPS = Key("rms_norm_eps", 1e-5)
GLM_ROUTER: Router = replace(
    ROUTER,
    count=Key(("n_routed_experts", "num_local_experts"), 128),
    scale=Key("routed_scaling_factor", 1.0),
    groups=Key("n_group", 1),
    top_groups=Key("topk_group", 1),
)


def _block(config: Mapping[str, Any], i: int) -> Block:
    is_dense = i < lookup(Key("first_k_dense_replace", 1), config)
    has_norms = as_bool(config.get("use_qk_norm") or False, "use_qk_norm")
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=Key("attention_bias", False),
            qk_norm=RMSNorm(eps=_EPS, width="head_dim") if has_norms else None,
        ),
        position=Rope(share=rotated_share(0.5)),
        mlp=GatedMLP(ACTIVATION) if is_dense else mixture(config, GLM_ROUTER),
    )


def _read(metadata: Metadata) -> dict[str, Any]:
    """The layers of files by llama.cpp count those that predict further tokens."""
    n_layers = metadata["block_count"] - metadata.get("nextn_predict_layers", 0)
    return {"num_hidden_layers": n_layers, "partial_rotary_factor": rotary_share(metadata)}


# The layer after the last predicts further tokens (46 of GLM-4.5-Air, 92 of the large ones): nothing reads it.
_FURTHER = ("46", "92")
ARCHITECTURE = Architecture(
    name="glm4_moe",
    releases=("GLM-4.5", "GLM-4.5-Air", "GLM-4.6", "GLM-4.7"),
    matches=("Glm4MoeForCausalLM",),
    model_types=("glm4_moe",),
    dims=replace(DIMS, extra={"expert_ffn": Key("moe_intermediate_size", 1408)}),
    block=PerLayer(_block),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=replace(
        NAMES,
        slots={**NAMES.slots, **QK_NORMS, **EXPERT_SLOTS},
        ignored=(*NAMES.ignored, *(f"model.layers.{i}.*" for i in _FURTHER)),
    ),
    gguf=GgufFamily(
        "glm4moe",
        slots={"mlp_norm": "post_attention_norm"},
        ignored=tuple(f"blk.{i}.*" for i in _FURTHER),
        keys=DENSE_FIRST_KEYS,
        config={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
        read=_read,
        write=lambda model, _: dense_first_metadata(model),
        refuses=needs_experts,
        tokenizer_pre="glm4",
    ),
    unused=("num_nextn_predict_layers", "num_mtp_layers", "output_router_logits"),
    tiny={
        **TINY,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "eos_token_id": [2, 3],
    },
    variants={
        "groups": {"n_group": 3, "topk_group": 2, "n_shared_experts": 2, "use_qk_norm": False, "norm_topk_prob": False},
        "defaults": {"partial_rotary_factor": None, "rope_theta": None, "first_k_dense_replace": 0},
    },
)
