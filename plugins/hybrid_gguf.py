"""Bamba and Granite 4.0 in GGUF files: Mamba 2 where a layer has no key heads, and one name for all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.gguf import GgufFamily, Metadata, heads_of_layers, main_block, needs_both_sorts
from llmkit.architecture.kinds import Rope
from llmkit.architecture.model import Model

from . import ssm_gguf
from .granite import SCALES
from .granite import metadata as scales_of

_SIZES = {
    "attention.head_count_kv": "",
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.group_count": "mamba_n_groups",
}
_SCALE = "attention.scale"  # Granite's files always have it


def _read(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    leaves = {name.split(".", 2)[-1] for name in names}
    return {
        "num_key_value_heads": max(metadata["attention.head_count_kv"]),
        "mamba_d_head": metadata["ssm.inner_size"] // metadata["ssm.time_step_rank"],
        "mamba_expand": ssm_gguf.expansion(metadata),
        "attention_bias": "attn_q.bias" in leaves,
        "mlp_bias": "ffn_up.bias" in leaves,
    }


def _read_bamba(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    heads = metadata["attention.head_count_kv"]
    return {**_read(metadata, names), "attn_layer_indices": [i for i, n in enumerate(heads) if n]}


def _read_granite(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    return {
        **_read(metadata, names),
        "layer_types": ["attention" if n else "mamba" for n in metadata["attention.head_count_kv"]],
        "position_embedding_type": "rope" if metadata.get("rope.scaling.finetuned", True) else "nope",
    }


def _write(model: Model, _: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention.head_count_kv": heads_of_layers(model),
        "rope.scaling.finetuned": isinstance(getattr(main_block(model), "position", None), Rope),
        **ssm_gguf.sizes(model),
    }


def _write_granite(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_write(model, config), **scales_of(model, config), "expert_feed_forward_length": None}


BAMBA = GgufFamily(
    "granitehybrid",
    pairs="interleaved",
    slots=ssm_gguf.under("attn", ssm_gguf.DUALITY),
    forms=ssm_gguf.duality_forms("attn"),
    keys=_SIZES,
    config={"hidden_act": "silu"},
    read_names=_read_bamba,
    write=_write,
    refuses=lambda model: needs_both_sorts(model) or ssm_gguf.needs_twice(model),
    claims=lambda metadata, _: _SCALE not in metadata,
)
GRANITE = replace(
    BAMBA,
    keys={**_SIZES, **SCALES, "feed_forward_length": "shared_intermediate_size"},
    config={"hidden_act": "silu", "num_local_experts": 0},
    read_names=_read_granite,
    write=_write_granite,
    claims=None,
    has_pairs_without_rope=True,
)
GRANITE_MOE = replace(
    GRANITE,
    keys={
        **_SIZES,
        **SCALES,
        "expert_count": "num_local_experts",
        "expert_feed_forward_length": "",
        "expert_shared_feed_forward_length": "shared_intermediate_size",
    },
    config={"hidden_act": "silu"},
)
