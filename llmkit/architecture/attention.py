"""The attention kinds."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.architecture.keys import Computed, Flag, Key, Number, as_bool, as_float, as_optional
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under
from llmkit.architecture.sizes import Sizes


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """score = cap(q.k * scale) for the keys in the window.

    Attributes:
        scale: multiplies the products.
        softcap: cap(x) = c * tanh(x / c); None for x.
        window: a query sees the last `window` keys, its own included; None for all before it.
        chunk: positions are divided into chunks of so many, and a query sees its own chunk only; None for one chunk.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    chunk: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class GroupedQuery(Kind):
    """Causal softmax attention, each key/value head shared by heads/kv_heads query heads (Ainslie et al. 2023).

    One group for all heads is multi-query, a group for each head is multi-head attention.

    Attributes:
        scale: multiplies the scores; None means 1/sqrt(head_dim).
        softcap: scores become c * tanh(score / c) before the mask (Gemma team 2024); None for none.
        window: a query sees the last `window` tokens, itself included; None for all.
        chunk: a query at position p sees tokens from position chunk * floor(p / chunk) on (Llama 4); None for all.
        qk_norm: normalises each head of queries and keys before positions are applied; None for none.
        k_norm: for keys, where it is another kind than for queries.
        sinks: each query head has a learned score that its softmax counts beside the keys', and that no value follows
            (gpt-oss; Xiao et al. 2023, arXiv:2309.17453, section 3.3).
        norms_all_heads: both normalise all heads of a token together, not each (OLMo 2).
        norms_rotated: both come after positions are applied (Hunyuan).
        clip: values, queries and keys (once they are normed) are cut off at -clip and clip; None for none.
        gate: what is attended is multiplied by sigmoid(gate(x)) before the output matrix (Qiu et al. 2025,
            arXiv:2505.06708); its matrix has the shape and the bias of the queries'.
        head_dim, kv_heads: formulas: the width of a head, and how many heads keys have, where layers differ.
    """

    string_keys = ("qkv_bias", "out_bias", "sinks", "gate")

    qkv_bias: Flag = False
    out_bias: Flag = False
    scale: Number | None = None
    softcap: Number | None = None
    window: Key | Computed | int | None = None
    chunk: int | None = None
    qk_norm: Kind | Computed | None = None
    k_norm: Kind | Computed | None = None
    sinks: Flag = False
    norms_all_heads: bool = False
    norms_rotated: bool = False
    clip: Number | None = None
    gate: Flag = False
    head_dim: str = "head_dim"
    kv_heads: str = "kv_heads"

    def slots(self) -> dict[str, SlotShape]:
        queries, keys = f"heads*{self.head_dim}", f"{self.kv_heads}*{self.head_dim}"
        slots = {
            **linear_slots("q", queries, "hidden", self.qkv_bias),
            **linear_slots("k", keys, "hidden", self.qkv_bias),
            **linear_slots("v", keys, "hidden", self.qkv_bias),
            **linear_slots("o", "hidden", queries, self.out_bias),
        }
        if self.is_gated:
            slots |= linear_slots("gate", queries, "hidden", self.qkv_bias)
        if self.norms is not None:
            slots |= under("q_norm", self.norms[0]) | under("k_norm", self.norms[1])
        if as_bool(self.sinks):
            slots["sinks"] = SlotShape(("heads",), "parameter")
        return slots

    @property
    def is_gated(self) -> bool:
        """Whether a bound kind multiplies what is attended by a gate."""
        return as_bool(self.gate)

    def score_rule(self, head_dim: int) -> ScoreRule:
        """How a bound kind makes scores."""
        scale = head_dim**-0.5 if self.scale is None else as_float(self.scale)
        window = self.window if isinstance(self.window, int) else None
        return ScoreRule(scale, as_optional(self.softcap), window, chunk=self.chunk)

    @property
    def limit(self) -> float | None:
        """The clip of a bound kind; None for none."""
        return as_optional(self.clip)

    def words(self, dims: Sizes) -> str:
        kv = f" (kv {dims.kv_heads})" if dims.kv_heads != dims.heads else ""
        return f"heads {dims.heads} × {dims.head_dim}{kv}"

    def widths(self, dims: Sizes) -> tuple[int, int]:
        """Numbers of a token: of all its queries, and of what later tokens see of it."""
        size, kv_heads = self.head_sizes(dims)
        return dims.heads * size, 2 * kv_heads * size

    def head_sizes(self, dims: Sizes) -> tuple[int, int]:
        """The width of a head, and the number of heads that keys have."""
        return dims.evaluate(self.head_dim), dims.evaluate(self.kv_heads)

    @property
    def norms(self) -> tuple[Kind, Kind] | None:
        """The norms of queries and keys of a bound kind; None for none."""
        q, k = self.qk_norm, self.k_norm if self.k_norm is not None else self.qk_norm
        return (q, k) if isinstance(q, Kind) and isinstance(k, Kind) else None
