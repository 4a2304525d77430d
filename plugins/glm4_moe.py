"""GLM-4.5 and its followers: after the first layers experts, chosen by sigmoids with a correction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily, Metadata, needs_experts, rotary_share
from llmkit.architecture.gguf_experts import LED_KEYS, led_experts
from llmkit.architecture.keys import Computed, Key, as_bool
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, PerLayer, RMSNorm, Rope, rotated_share
from llmkit.architecture.names import linears

from .llama import DIMS, NAMES, TINY

_EPS = Key("rms_norm_eps", 1e-5)
_ACTIVATION = Key("hidden_act", "silu")
_EXPERTS = Experts(
    _ACTIVATION,
    router=Router(
        count=Key(("n_routed_experts", "num_local_experts"), 128),
        top_k=Key("num_experts_per_tok", 8),
        scores="sigmoid",
        is_normalized=Key("norm_topk_prob", True),
        epsilon=1e-20,
        scale=Key("routed_scaling_factor", 1.0),
        correction=True,
        groups=Key("n_group", 1),
        top_groups=Key("topk_group", 1),
        group_score="top2",
        is_single=True,
    ),
    shared="shared_ffn",
)


def _shared_width(config: Mapping[str, Any]) -> int:
    return int(config.get("moe_intermediate_size") or 1408) * int(config.get("n_shared_experts") or 1)


def _block(config: Mapping[str, Any], i: int) -> Block:
    has_norms = as_bool(config.get("use_qk_norm") or False, "use_qk_norm")
    n_dense = config.get("first_k_dense_replace")
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=Key("attention_bias", False),
            qk_norm=RMSNorm(eps=_EPS, width="head_dim") if has_norms else None,
        ),
        position=Rope(share=rotated_share(0.5)),
        mlp=GatedMLP(_ACTIVATION) if i < (1 if n_dense is None else n_dense) else _EXPERTS,
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
    dims=replace(DIMS, extra={"expert_ffn": Key("moe_intermediate_size", 1408), "shared_ffn": Computed(_shared_width)}),
    block=PerLayer(_block),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            "attn.q_norm": "self_attn.q_norm",
            "attn.k_norm": "self_attn.k_norm",
            "mlp.router": "mlp.gate",
            "mlp.router.correction": "mlp.gate.e_score_correction_bias",
            **linears("mlp.experts.{e}", "mlp.experts.{e}"),
            **linears("mlp.shared", "mlp.shared_experts"),
        },
        ignored=(*NAMES.ignored, *(f"model.layers.{i}.*" for i in _FURTHER)),
    ),
    gguf=GgufFamily(
        "glm4moe",
        slots={"mlp_norm": "post_attention_norm"},
        ignored=tuple(f"blk.{i}.*" for i in _FURTHER),
        keys=LED_KEYS,
        config={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
        read=_read,
        write=lambda model, _: led_experts(model),
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
