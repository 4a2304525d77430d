"""The kind of the gated delta rule: linear attention whose state is corrected instead of summed up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under
from llmkit.architecture.kinds import RMSNorm
from llmkit.architecture.sizes import Sizes

NORM_EPS = 1e-6
"""Added to the sum of squares of a head of queries or keys, in the original and in its kernels."""


def delta_sizes(
    *, heads: Key, width: Key, kernel: Key, value_heads: Key | None = None, value_width: Key | None = None
) -> dict[str, Key | Computed]:
    """`Dims.extra` of the delta rule; heads of values are as many and as wide as those of keys, or as said."""
    return {
        "delta_key_heads": heads,
        "delta_value_heads": value_heads or heads,
        "delta_key_dim": width,
        "delta_value_dim": value_width or width,
        "delta_kernel": kernel,
    }


@dataclass(frozen=True)
class GatedDeltaNet(Kind):
    """Linear attention by the gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464).

    Queries, keys and values go through a short causal convolution and its activation; queries and keys then have L2
    norm 1. Each value head has a matrix S [key_dim, value_dim] for a state:

        S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,   o_t = S_t^T q_t / sqrt(key_dim)

    with g = -exp(A_log) softplus(in_a(x) + dt_bias) and b = sigmoid(in_b(x)). The output of the layer is
    out(norm(o) silu(in_z(x))). A key head serves value_heads / key_heads value heads, one after the other.

    Its sizes are `Dims.extra`: `delta_key_heads`, `delta_value_heads`, `delta_key_dim`, `delta_value_dim` (of a head),
    and `delta_kernel`, the tokens that the convolution sees.

    Attributes:
        norm: of each head of the output.
        act: of the convolution; the name of the activation, or a `Key` that holds it.
    """

    norm: RMSNorm
    act: str | Any = "silu"

    def words(self, dims: Sizes) -> str:
        keys, values = ([dims.extra[f"delta_{of}_{size}"] for size in ("heads", "dim")] for of in ("key", "value"))
        return f"DeltaNet keys {keys[0]} × {keys[1]}, values {values[0]} × {values[1]}"

    def slots(self) -> dict[str, SlotShape]:
        keys, values = "delta_key_heads*delta_key_dim", "delta_value_heads*delta_value_dim"
        slots: dict[str, SlotShape] = {}
        for name, out in {"in_q": keys, "in_k": keys, "in_v": values, "in_z": values}.items():
            slots |= linear_slots(name, out, "hidden", False)
        for name in ("in_b", "in_a"):
            slots |= linear_slots(name, "delta_value_heads", "hidden", False)
        for name, channels in {"conv_q": keys, "conv_k": keys, "conv_v": values}.items():
            slots[f"{name}.weight"] = SlotShape((channels, "1", "delta_kernel"), "parameter")
        slots["dt_bias"] = SlotShape(("delta_value_heads",), "parameter")
        slots["A_log"] = SlotShape(("delta_value_heads",), "parameter")
        return slots | under("out_norm", self.norm) | linear_slots("out", "hidden", values, False)


@dataclass(frozen=True)
class KimiDeltaAttention(GatedDeltaNet):
    """The gated delta rule with a decay for each channel of a key (Kimi team 2025, arXiv:2510.26692, section 3).

        S_t = diag(exp(g_t)) S_{t-1} + k_t (b_t (v_t - (diag(exp(g_t)) S_{t-1})^T k_t))^T

    with g = -exp(A_log) softplus(decay_b(decay_a(x)) + dt_bias), A_log of each head, and b = sigmoid(rate(x)). With o_t
    as above, the output of the layer is o(norm(o_t) sigmoid(gate_b(gate_a(x)))). There are as many heads of keys as of
    values, and they are as wide.
    """

    def slots(self) -> dict[str, SlotShape]:
        inner, width = "delta_key_heads*delta_key_dim", "delta_key_dim"
        slots: dict[str, SlotShape] = {}
        for name in "qkv":
            slots |= linear_slots(name, inner, "hidden", False)
            slots[f"conv_{name}.weight"] = SlotShape((inner, "1", "delta_kernel"), "parameter")
        slots |= linear_slots("rate", "delta_key_heads", "hidden", False)
        for name in ("decay", "gate"):
            slots |= linear_slots(f"{name}_a", width, "hidden", False) | linear_slots(f"{name}_b", inner, width, False)
        slots["dt_bias"] = SlotShape((inner,), "parameter")
        slots["A_log"] = SlotShape(("1", "1", "delta_key_heads", "1"), "parameter")
        return slots | under("out_norm", self.norm) | linear_slots("o", "hidden", inner, False)
