"""Solar Open: GLM-4.5's experts in every layer, and Llama's attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.gguf import Metadata
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GroupedQuery, PerLayer, RMSNorm, Rope
from llmkit.architecture.positions import THETA_KEYS

from .deepseek2 import EXPERT_SLOTS, mixture
from .glm4_moe import ARCHITECTURE as GLM4_MOE
from .glm4_moe import GLM_ROUTER
from .llama import NAMES


def _block(config: Mapping[str, Any], _: int) -> Block:
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(qkv_bias=Key("attention_bias", False)),
        position=Rope(theta=Key(THETA_KEYS, 1000000.0)),
        mlp=mixture(config, GLM_ROUTER),
    )


def _is_solar(metadata: Metadata, names: Collection[str]) -> bool:
    """To llama.cpp it is a GLM-4.5: one without dense layers and norms of queries, whose heads rotate whole."""
    is_whole = metadata.get("rope.dimension_count") == metadata.get("attention.key_length")
    has_norms = any(name.endswith("attn_q_norm.weight") for name in names)
    return metadata.get("leading_dense_block_count") == 0 and is_whole and not has_norms


_NOT_ITS = ("architectures", "model_type", "first_k_dense_replace", "use_qk_norm")
assert GLM4_MOE.gguf is not None  # noqa: S101
ARCHITECTURE = replace(
    GLM4_MOE,
    name="solar_open",
    releases=("Solar Open 100B",),
    matches=("SolarOpenForCausalLM",),
    model_types=("solar_open",),
    dims=replace(
        GLM4_MOE.dims,
        head_dim=Key("head_dim", 128),
        ffn=Key("intermediate_size", 10240),  # of no layer
        extra={"expert_ffn": Key("moe_intermediate_size", 1280)},
    ),
    block=PerLayer(_block),
    names=replace(NAMES, slots={**NAMES.without("mlp.gate", "mlp.up", "mlp.down"), **EXPERT_SLOTS}),
    gguf=replace(GLM4_MOE.gguf, ignored=(), tokenizer_pre=None, claims=_is_solar),
    fixed={f"{outer}partial_rotary_factor": 1.0 for outer in ("", "rope_parameters.", "rope_scaling.")},
    unused=("intermediate_size", "first_k_dense_replace", "use_qk_norm", "output_router_logits"),
    tiny={
        **{k: v for k, v in GLM4_MOE.tiny.items() if k not in _NOT_ITS},
        "attention_bias": False,
        "intermediate_size": 80,
        "partial_rotary_factor": 1.0,
    },
    variants={
        "groups": {"n_group": 3, "topk_group": 2, "n_shared_experts": 2, "norm_topk_prob": False},
        "biases": {
            "attention_bias": True,
            "rope_theta": None,
            "tie_word_embeddings": True,
        },
    },
)
