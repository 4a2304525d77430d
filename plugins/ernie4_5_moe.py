"""ERNIE 4.5 with experts (21B-A3B, 300B-A47B): a softmax over all of them, chosen with a correction; shared experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily, Metadata, needs_experts
from llmkit.architecture.keys import Computed, Key, as_float, lookup
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, PerLayer, RMSNorm, Rope
from llmkit.architecture.model import Model
from llmkit.architecture.positions import THETA_KEYS

from .deepseek2 import EXPERT_SLOTS
from .llama import DIMS, NAMES, TINY

_ACTIVATION = Key("hidden_act", "silu")
_N_SHARED = Key("moe_num_shared_experts", 2)


def _number(config: Mapping[str, Any], name: str, default: int) -> int:
    return int(as_float(lookup(Key(name, default), config), name))


def _experts(config: Mapping[str, Any]) -> Experts:
    return Experts(
        _ACTIVATION,
        router=Router(
            count=Key(("num_experts", "moe_num_experts"), 64),
            top_k=Key(("num_experts_per_tok", "moe_k"), 6),
            is_normalized=True,
            correction=True,
            correction_rows="1",
            is_single=True,
        ),
        shared="shared_ffn" if lookup(_N_SHARED, config) else None,
    )


def _block(config: Mapping[str, Any], i: int) -> Block:
    last = _number(config, "moe_layer_end_index", -1)
    is_between = _number(config, "moe_layer_start_index", 1) <= i and (last == -1 or i <= last)
    has_experts = is_between and (i + 1) % _number(config, "moe_layer_interval", 1) == 0
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(),
        position=Rope(theta=Key(THETA_KEYS, 500000.0), pairs="interleaved"),
        mlp=_experts(config) if has_experts else GatedMLP(_ACTIVATION),
    )


def _shared_width(config: Mapping[str, Any]) -> int:
    return _number(config, "moe_intermediate_size", 1536) * max(1, _number(config, "moe_num_shared_experts", 2))


def _read(metadata: Metadata) -> dict[str, Any]:
    shared = metadata.get("expert_shared_feed_forward_length", 0)
    return {"moe_num_shared_experts": shared // metadata["expert_feed_forward_length"]}


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    mlps = [block.mlp for block in model.blocks if isinstance(block, Block)]
    return {
        "leading_dense_block_count": next(i for i, mlp in enumerate(mlps) if isinstance(mlp, Experts)),
        "interleave_moe_layer_step": 1,  # llama.cpp looks for experts in all layers after those
        "expert_shared_count": _number(config, "moe_num_shared_experts", 2),
    }


_TINY = {
    **TINY, "moe_intermediate_size": 24, "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_interval": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
_KEYS = {
    "leading_dense_block_count": "moe_layer_start_index", "interleave_moe_layer_step": "moe_layer_interval",
    "expert_count": "moe_num_experts", "expert_used_count": "moe_k", "expert_shared_feed_forward_length": "",
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="ernie4_5_moe",
    releases=("ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B"),
    matches=("Ernie4_5_MoeForCausalLM",),
    model_types=("ernie4_5_moe",),
    dims=replace(
        DIMS,
        kv_heads=Key("num_key_value_heads", 4),
        extra={"expert_ffn": Key("moe_intermediate_size", 1536), "shared_ffn": Computed(_shared_width)},
    ),
    block=PerLayer(_block),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **EXPERT_SLOTS,
            "mlp.router.correction": "mlp.moe_statics.e_score_correction_bias",
        },
        ignored=(*NAMES.ignored, "model.mtp_*"),  # layers that predict further tokens: nothing reads them
    ),
    gguf=GgufFamily(
        "ernie4_5-moe",
        pairs="interleaved",
        keys=_KEYS,
        config={"hidden_act": "silu"},
        read=_read,
        write=_write,
        refuses=needs_experts,
    ),
    unused=("router_aux_loss_coef", "output_router_logits", "moe_capacity", "moe_gate", "moe_use_aux_free"),
    fixed={"use_bias": False, "moe_norm_min": 1e-12},
    tiny=_TINY,
    variants={
        "unshared": {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 0},
        "defaults": {"rope_theta": None, "rms_norm_eps": None, "moe_layer_end_index": -1, "tie_word_embeddings": False},
    },
)
