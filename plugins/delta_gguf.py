"""Qwen3-Next and Qwen3.5 in GGUF files: what Gated DeltaNets read lies in rows of q, k, v and of the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.deltanet import GatedDeltaNet
from llmkit.architecture.gguf import (
    DECAY,
    Form,
    GgufFamily,
    Metadata,
    main_block,
    needs_both_sorts,
    needs_experts,
    rotary_share,
)
from llmkit.architecture.kinds import Rope
from llmkit.architecture.model import Model
from llmkit.architecture.names import Fused

_SORTS = ("full_attention", "linear_attention")
# In turn of each key head: the value heads that it serves lie one after the other in checkpoints.
_HEADS = ("delta_key_heads", "delta_value_heads")
_IN_TURN = Form(rows=_HEADS)


def _is_linear(model: Model) -> list[bool]:
    return [isinstance(getattr(block, "attention", None), GatedDeltaNet) for block in model.blocks]


def _read(metadata: Metadata) -> dict[str, Any]:
    n, interval = metadata["block_count"], metadata.get("full_attention_interval", 4)
    is_linear = metadata.get("attention.recurrent_layers") or [(i + 1) % interval != 0 for i in range(n)]
    return {
        "layer_types": [_SORTS[bool(linear)] for linear in is_linear],
        "linear_value_head_dim": metadata["ssm.inner_size"] // metadata["ssm.time_step_rank"],
        "partial_rotary_factor": rotary_share(metadata),
    }


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = model.dims.extra
    return {
        "attention.recurrent_layers": _is_linear(model),
        "full_attention_interval": config.get("full_attention_interval") or 4,
        "ssm.conv_kernel": sizes["delta_kernel"],
        "ssm.state_size": sizes["delta_key_dim"],
        "ssm.group_count": sizes["delta_key_heads"],
        "ssm.time_step_rank": sizes["delta_value_heads"],
        "ssm.inner_size": sizes["delta_value_heads"] * sizes["delta_value_dim"],
    }


def _sections(model: Model, config: Mapping[str, Any]) -> list[int]:
    """How many pairs of dims turn with the time, the height and the width of a place, one after the other in turn."""
    position = getattr(main_block(model), "position", None)
    pairs = position.rotated(model.dims.head_dim) // 2 if isinstance(position, Rope) else 0
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stated = parameters.get("mrope_section", (11, 11, 10))
    return [*stated, 0] if sum(stated) == pairs and len(stated) == 3 else [*((pairs + 2 - k) // 3 for k in range(3)), 0]


def _refuses(model: Model) -> str | None:
    if model.dims.extra["delta_key_dim"] != model.dims.extra["delta_value_dim"]:
        return "heads of its Gated DeltaNets have keys and values of two widths"
    return needs_both_sorts(model)


GGUF_NEXT = GgufFamily(
    "qwen3next",
    slots={
        "mlp_norm": "post_attention_norm",
        "attn.q_gate": Fused("attn_q", ("q", "gate"), rows="per_group", groups="heads"),
        "attn.in_qkv": Fused("attn_qkv", ("in_q", "in_k", "in_v")),
        "attn.in_z": "attn_gate",
        "attn.in_ba": Fused("ssm_ba", ("in_b", "in_a"), "per_group", "delta_key_heads"),
        "attn.conv": Fused("ssm_conv1d", ("conv_q", "conv_k", "conv_v")),
        "attn.dt_bias": "ssm_dt.bias",
        "attn.A_log": "ssm_a",
        "attn.out_norm": "ssm_norm",
        "attn.out": "ssm_out",
    },
    norm_offset=1.0,
    unshifted=("attn.out_norm.weight",),
    forms={"attn.A_log": DECAY},
    keys={
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
    },
    config={"hidden_act": "silu", "norm_topk_prob": True},
    read=_read,
    write=_write,
    refuses=lambda model: _refuses(model) or needs_experts(model),
)
GGUF = replace(
    GGUF_NEXT,
    arch="qwen35",
    slots={
        **{slot: entry for slot, entry in GGUF_NEXT.slots.items() if slot != "attn.in_ba"},
        "attn.in_a": "ssm_alpha",
        "attn.in_b": "ssm_beta",
    },
    forms={
        **{f"attn.{part}.weight": _IN_TURN for part in ("in_v", "in_z", "in_a", "in_b", "conv_v")},
        "attn.dt_bias": _IN_TURN,
        "attn.A_log": replace(_IN_TURN, value="-exp"),
        "attn.out.weight": Form(columns=_HEADS),
    },
    config={"hidden_act": "silu"},
    write=lambda model, config: {**_write(model, config), "rope.dimension_sections": _sections(model, config)},
    refuses=_refuses,
)
GGUF_MOE = replace(GGUF, arch="qwen35moe")
