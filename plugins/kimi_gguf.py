"""Kimi Linear in GGUF files: layers of the delta rule have no key heads, the others all that is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Experts
from llmkit.architecture.gguf import (
    DECAY,
    Form,
    GgufFamily,
    Metadata,
    have_attention,
    needs_both_sorts,
    needs_experts,
)
from llmkit.architecture.gguf_experts import DENSE_FIRST_KEYS, dense_first_metadata
from llmkit.architecture.keys import as_bool
from llmkit.architecture.model import Model

from . import latent
from .deepseek_gguf import compressed, split

_SORTS = ("linear_attention", "full_attention")
_CONV = Form(("1", "delta_key_heads*delta_key_dim", "1", "delta_kernel"))
_LAYERS = {
    "dt_bias": "ssm_dt.bias", "A_log": "ssm_a", "out_norm": "ssm_norm", "rate": "ssm_beta",
    **{f"conv_{part}": f"ssm_conv1d_{part}" for part in "qkv"},
    **{f"{name}_{part}": f"ssm_{short}_{part}" for name, short in (("decay", "f"), ("gate", "g")) for part in "ab"},
}  # fmt: skip


def _read(metadata: Metadata) -> dict[str, Any]:
    heads = metadata["attention.head_count_kv"]
    heads = heads if isinstance(heads, list) else [heads] * metadata["block_count"]
    return {
        **latent.sizes_in_file(metadata),
        "layer_types": [_SORTS[n > 0] for n in heads],
        "num_key_value_heads": metadata["attention.head_count"],  # of transformers' class
        "linear_num_heads": metadata["attention.head_count"],
    }


def _write(model: Model, _: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **compressed(model),
        "attention.head_count_kv": [int(has) for has in have_attention(model)],
        "ssm.conv_kernel": model.dims.extra["delta_kernel"],
        "kda.head_dim": model.dims.extra["delta_key_dim"],
        **dense_first_metadata(model),
    }


def _refuses(model: Model) -> str | None:
    sizes, heads = model.dims.extra, model.dims.heads
    if sizes["q_rank"]:
        return "it reads queries that are not compressed"
    if sizes["delta_key_heads"] != heads:
        return f"layers of the delta rule have {sizes['delta_key_heads']} heads, and the others {heads}"
    mlps = [getattr(block, "mlp", None) for block in model.blocks]
    if not all(as_bool(mlp.router.is_normalized) for mlp in mlps if isinstance(mlp, Experts)):
        return "it divides the weights of the chosen experts by their sum"
    return needs_experts(model) or needs_both_sorts(model)


_WHOLE = replace(
    latent.GGUF,
    arch="kimi-linear",
    slots={**latent.GGUF.slots, **{f"attn.{slot}": name for slot, name in _LAYERS.items()}},
    forms={
        "attn.A_log": replace(DECAY, shape=("1", "1", "delta_key_heads", "1")),
        **{f"attn.conv_{part}.weight": _CONV for part in "qkv"},
    },
    keys={
        **latent.GGUF.keys,
        **DENSE_FIRST_KEYS,
        "context_length": "model_max_length",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_token",
        "expert_shared_count": "num_shared_experts",
        "expert_weights_norm": "moe_renormalize",
        "expert_group_count": "num_expert_group",
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "kda.head_dim": "linear_head_dim",
    },
    read=_read,
    write=_write,
    refuses=_refuses,
)
GGUF: GgufFamily = split(_WHOLE)
