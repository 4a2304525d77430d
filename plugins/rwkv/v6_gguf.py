"""RWKV-6 in GGUF files: what tokens are mixed by is one tensor, low-rank products are transposed, layers are halved."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Any

from llmkit.architecture.gguf import Form, GgufFamily
from llmkit.architecture.kinds import LayerNorm
from llmkit.architecture.model import Model
from llmkit.architecture.names import Entry

from .v5_kind import Finch
from .v7_gguf import sizes_of_heads

_EPS, _HEAD_EPS = 1e-5, 64e-5  # of the last norm in transformers, and of the norm of each head in llama.cpp
_LAYERS: Mapping[str, Entry] = {
    "r": "receptance", "k": "key", "v": "value", "g": "gate", "o": "output", "head_norm": "ln",
    "mix_x": "lerp_x.weight", "mix_down": "w1.weight", "mix_up": "w2.weight", "first": "first.weight",
    "decay": "decay.weight", "decay_down": "decay_w1.weight", "decay_up": "decay_w2.weight",
}  # fmt: skip
_VECTOR, _TRANSPOSED, _HALVED = Form(("hidden",)), Form(is_transposed=True), Form(halved_after="rescale_every")


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = model.dims.extra
    return {
        **sizes_of_heads(model),
        "attention.layer_norm_epsilon": float(config.get("layer_norm_epsilon", _EPS)),
        "rescale_every_n_layers": sizes["rescale_every"],
        "time_mix_extra_dim": sizes["mix_rank"],
        "time_decay_extra_dim": sizes["w_rank"],
    }


def _refuses(model: Model) -> str | None:
    first, block = model.embedding.norm, model.block
    if isinstance(first, LayerNorm) and not isclose(first.epsilon, _EPS, rel_tol=1e-5):
        return f"it has one epsilon for all norms, and this model {first.epsilon:g} and, for the last, {_EPS:g}"
    if isinstance(block, Finch) and not isclose(block.head_norm.epsilon, _HEAD_EPS, rel_tol=1e-5):
        return f"it norms heads with an epsilon of {_HEAD_EPS:g}, and this model with {block.head_norm.epsilon:g}"
    return None


GGUF = GgufFamily(
    "rwkv6",
    slots={
        "mlp_norm": "attn_norm_2",
        **{f"attn.mix_{name}": f"time_mix_lerp_fused.{i}.weight" for i, name in enumerate(Finch.mixed)},
        **{f"attn.{slot}": f"time_mix_{name}" for slot, name in _LAYERS.items()},
        **{f"mlp.mix_{name}": f"channel_mix_lerp_{name}.weight" for name in "kr"},
        **{f"mlp.{name}": f"channel_mix_{name}" for name in ("key", "value", "receptance")},
    },
    stacked=("time_mix_lerp_fused",),
    forms={
        **dict.fromkeys(("attn.mix_x", "attn.decay", "mlp.mix_k", "mlp.mix_r"), _VECTOR),
        **dict.fromkeys(("attn.mix_down", "attn.decay_down", "attn.decay_up"), _TRANSPOSED),
        "attn.mix_up": Form(("5", "mix_rank", "hidden"), is_transposed=True),
        **dict.fromkeys(("attn.o.weight", "mlp.value.weight"), _HALVED),
    },
    keys={
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "rescale_every_n_layers": "rescale_every",
        "wkv.head_size": "head_size",
        "time_mix_extra_dim": "time_mix_extra_dim",
        "time_decay_extra_dim": "time_decay_extra_dim",
        **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), ""),
    },
    write=_write,
    refuses=_refuses,
    has_own_head=True,
)
