"""RWKV-7 in GGUF files: what tokens are mixed by is one tensor, and the first layer has weights that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose

from llmkit.architecture.gguf import Form, GgufFamily
from llmkit.architecture.model import Model
from llmkit.architecture.names import Entry

from .v7_kind import GeneralizedDelta
from .v7_mix import MIXED

_HEADS = (64, 128)  # ggml's kernels leave others out, on the CPU in silence
_HEAD_EPS = 64e-5  # of the norm of each head, in llama.cpp
_LAYERS: Mapping[str, Entry] = {"r": "receptance", "k": "key", "v": "value", "o": "output", "head_norm": "ln"}
_RANKS = {
    "attention.decay_lora_rank": "decay_low_rank_dim",
    "attention.iclr_lora_rank": "a_low_rank_dim",
    "attention.value_residual_mix_lora_rank": "v_low_rank_dim",
    "attention.gate_lora_rank": "gate_low_rank_dim",
}


def sizes_of_heads(model: Model) -> dict[str, int | None]:
    """What files of RWKV say of heads: their width, no keys of attention, and a context without an end."""
    return {
        "context_length": 2**20,
        "attention.head_count": 0,
        **dict.fromkeys(("attention.head_count_kv", "attention.key_length", "attention.value_length")),
        "wkv.head_size": model.dims.head_dim,
    }


def _write(model: Model, _: object) -> dict[str, int | None]:
    return {
        **sizes_of_heads(model),
        **{key: model.dims.extra[f"{name}_rank"] for key, name in zip(_RANKS, "wavg", strict=True)},
    }


def _refuses(model: Model) -> str | None:
    if model.dims.head_dim not in _HEADS:
        return f"its heads are {model.dims.head_dim} wide, not {' or '.join(map(str, _HEADS))}"
    block = model.block
    if isinstance(block, GeneralizedDelta) and not isclose(block.head_norm.epsilon, _HEAD_EPS, rel_tol=1e-5):
        return f"it norms heads with an epsilon of {_HEAD_EPS:g}, and this model with {block.head_norm.epsilon:g}"
    return None


GGUF = GgufFamily(
    "rwkv7",
    slots={
        "mlp_norm": "attn_norm_2",
        **{f"attn.mix_{name}": f"time_mix_lerp_fused.{i}.weight" for i, name in enumerate(MIXED)},
        **{f"attn.{slot}": f"time_mix_{name}" for slot, name in _LAYERS.items()},
        **{f"attn.{name}": f"time_mix_{name}.weight" for name in ("k_k", "k_a", "r_k")},
        **{f"attn.{name}_down": f"time_mix_{name}1" for name in "wavg"},
        **{f"attn.{name}_up": f"time_mix_{name}2" for name in "wavg"},
        **{f"attn.{name}_up.bias": f"time_mix_{name}0.weight" for name in "wav"},
        "mlp.mix_k": "channel_mix_lerp_k.weight",
        "mlp.key": "channel_mix_key",
        "mlp.value": "channel_mix_value",
    },
    stacked=("time_mix_lerp_fused",),
    forms={"attn.r_k": Form(("hidden",))},
    repeats={f"blk.0.time_mix_v{i}.weight": f"blk.0.time_mix_a{i}.weight" for i in range(3)},
    ignored=("blk.0.time_mix_v?.weight",),
    keys={
        "attention.layer_norm_epsilon": "norm_eps",
        "wkv.head_size": "head_dim",
        **_RANKS,
        **dict.fromkeys(("context_length", "attention.head_count", "attention.head_count_kv"), ""),
    },
    config={"hidden_act": "sqrelu", "norm_first": True},
    write=_write,
    refuses=_refuses,
    has_own_head=True,
)
