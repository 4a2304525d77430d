"""The kind of sparse latent attention: a light indexer chooses the tokens that each query sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llmkit.architecture.keys import Computed, Key, Number, as_float, lookup
from llmkit.architecture.kind import SlotShape, linear_slots, under
from llmkit.architecture.kinds import LayerNorm
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.positions import Rope
from llmkit.architecture.sizes import Sizes
from llmkit.errors import SpecError


@dataclass(frozen=True)
class RecordingRope(Rope):
    """Rotary positions of layers that leave something for those after them (`IndexedAttention.shares`)."""


@dataclass(frozen=True)
class IndexedAttention(LatentAttention):
    """Latent attention to the `top_k` tokens with the highest index scores (DeepSeek-AI 2025, DeepSeek-V3.2).

    The indexer has H small heads of queries, index_q(norm(q_a(x))), and one key for each token, norm(index_k(x)); both
    are rotated in their first dims. With w = index_weights(x) / sqrt(H), the score of key t for query s is

        sum over h of w_sh relu(q_sh . k_t / sqrt(index_dim))

    Up to `top_k` tokens all are seen. The key of the indexer is cached beside what is compressed. Its sizes are
    `Dims.extra`: `index_heads` and `index_dim`.

    Attributes:
        top_k: how many tokens a query sees.
        has_halves: rotary pairs of the indexer are dims j and j + R/2, where those of the attention are 2j and 2j + 1.
        shares: this layer has no indexer, and sees what the last layer before it chose that has one (GLM-5).
    """

    top_k: Number = 2048
    has_halves: bool = False
    shares: bool = False

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        top_k = as_float(bound.top_k, "index_topk")
        if top_k != int(top_k) or top_k < 1:
            raise SpecError(f"config.json: index_topk is {bound.top_k!r}, expected a positive whole number")
        if not bound.compresses_queries:
            raise SpecError("config.json: q_lora_rank is null, and the indexer reads compressed queries")
        return bound

    def slots(self) -> dict[str, SlotShape]:
        return (
            super().slots()
            if self.shares
            else super().slots()
            | {
                **linear_slots("index_q", "index_heads*index_dim", "q_rank", False),
                **linear_slots("index_k", "index_dim", "hidden", False),
                **under("index_k_norm", self.index_norm),
                **linear_slots("index_weights", "index_heads", "hidden", False),
            }
        )

    @property
    def index_norm(self) -> LayerNorm:
        """The norm of the indexer's keys."""
        return LayerNorm(eps=1e-6, width="index_dim")

    @property
    def n_seen(self) -> int:
        """How many tokens a query of a bound kind sees."""
        return int(as_float(self.top_k))

    def cached(self, dims: Sizes) -> int:
        """Numbers that are kept of a token."""
        return dims.extra["cache_width"] + (0 if self.shares else dims.extra["index_dim"])

    def order(self, dims: Sizes) -> list[int] | None:
        """The order of the dims of an index head in which pairs lie as those of the attention do; None as they are.

        Queries and keys in one order have the same products.
        """
        if not self.has_halves:
            return None
        half = dims.head_dim // 2
        rotated = [j for pair in zip(range(half), range(half, 2 * half), strict=True) for j in pair]
        return [*rotated, *range(2 * half, dims.extra["index_dim"])]

    def widths(self, dims: Sizes) -> tuple[int, int]:
        return dims.heads * self.cached(dims), self.cached(dims)


def index_sizes(*, heads: int) -> dict[str, Key | Computed]:
    """`Dims.extra` of an indexer.

    Raises:
        SpecError: when bound, if its heads are narrower than what is rotated.
    """
    rotated = Key("qk_rope_head_dim", 64)

    def width(config: Mapping[str, Any]) -> Any:
        wide, narrow = lookup(Key("index_head_dim", 128), config), lookup(rotated, config)
        if as_float(wide, "index_head_dim") < as_float(narrow, "qk_rope_head_dim"):
            raise SpecError(f"config.json: index_head_dim {wide} is less than the {narrow} dims that are rotated")
        return wide

    return {"index_heads": Key("index_n_heads", heads), "index_dim": Computed(width)}
