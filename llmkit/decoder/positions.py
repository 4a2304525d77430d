"""The torch reader of the position kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from llmkit.architecture.frequencies import frequencies as computed_frequencies
from llmkit.architecture.hooks import Hooks, reader_of
from llmkit.architecture.indexer import RecordingRope
from llmkit.architecture.kinds import Alibi, Kind, NoPositions, Rope
from llmkit.architecture.positions import CoarseAlibi, QueryGrowth, alibi_slopes
from llmkit.architecture.scaling import DynamicNTK, LongRope, Scaling
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.kv import Cache, Places
from llmkit.decoder.scores import Scores
from llmkit.lazy_imports import torch


class Positions:
    """What a position kind does; this one does nothing, others override what they need."""

    exact_sharing_limit: int | None = None
    """The longest sequence whose prefix gives the same keys whatever follows; None for any length."""
    recompute_beyond: int | None = None
    """A sequence that grows past this many tokens needs the keys of all of them anew; None for never."""

    def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> Any:
        """What one forward pass needs, for all layers.

        Args:
            input_ids: [B, S] the new tokens.
            places: where they stand.
            cache: its `memory` keeps what later passes need to know of these tokens.
        """
        return None

    def rotate(self, heads: torch.Tensor, table: Any) -> torch.Tensor:
        """Heads [B, S, n, head_dim] of queries and keys with their positions."""
        return heads

    def scaled(self, queries: torch.Tensor, table: Any) -> torch.Tensor:
        """Queries [B, S, heads, head_dim], after `rotate`, multiplied by what grows with their positions."""
        return queries

    def score(self, scores: Scores, table: Any) -> Scores:
        """How scores are made, with what the positions add."""
        return scores

    def notes(self, table: Any) -> dict[str, Any] | None:
        """What layers of one pass leave for those after them; None where they leave nothing."""
        return None


def build_positions(kind: Kind, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
    """The reader of a position kind.

    Raises:
        RequirementError: no torch reader for the kind or its scaling.
    """
    reader = reader_of(kind, _READERS)(dims, dtype, device)
    growth = getattr(kind, "growth", None)
    return reader if growth is None else _ScaledQueries(reader, growth)


def is_counted(kind: Kind) -> bool:
    """Whether what a kind gives a token follows from its position alone, and nothing is remembered of it."""
    return type(kind) in (Alibi, CoarseAlibi, NoPositions, Rope)


def limits(readers: Iterable[Positions]) -> tuple[int | None, int | None]:
    """The strictest `exact_sharing_limit` and `recompute_beyond` of several readers; None for none."""
    all_readers = list(readers)
    sharing = [r.exact_sharing_limit for r in all_readers if r.exact_sharing_limit is not None]
    rebuilt = [r.recompute_beyond for r in all_readers if r.recompute_beyond is not None]
    return min(sharing, default=None), min(rebuilt, default=None)


class AlibiBias(Positions):
    """Linear biases by the position of the key, float32."""

    def __init__(self, kind: Alibi, dims: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self._slopes = torch.tensor(kind.slopes(dims.heads), device=device)

    def bias(self, positions: torch.Tensor) -> torch.Tensor:
        """[B, T] positions -> [B, heads, T]."""
        return self._slopes[:, None] * positions[:, None].float()

    def score(self, scores: Scores, table: Any) -> Scores:
        return replace(scores, key_bias=self.bias)


class _CoarseAlibi(Positions):
    def __init__(self, kind: CoarseAlibi, dims: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self._slopes = torch.tensor(alibi_slopes(dims.heads), device=device).bfloat16()
        self._scale = float(dims.head_dim**-0.5)

    def score(self, scores: Scores, table: Any) -> Scores:
        return replace(scores, key_bias=lambda at: (self._slopes[:, None] * at[:, None]).float() * self._scale)


class _ScaledQueries(Positions):
    """Another reader's positions, with queries scaled by a function of their position."""

    def __init__(self, inner: Positions, growth: QueryGrowth) -> None:
        self._inner, self._growth = inner, growth.numbers
        self.exact_sharing_limit, self.recompute_beyond = inner.exact_sharing_limit, inner.recompute_beyond

    def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> Any:
        """The other reader's table, and the factors of queries [B, S, 1, 1] float32."""
        beta, length, first = self._growth
        factors = 1 + beta * torch.log1p(torch.floor((places.positions + first) / length))
        return self._inner.table(input_ids, places, cache), factors[:, :, None, None]

    def rotate(self, heads: torch.Tensor, table: Any) -> torch.Tensor:
        return self._inner.rotate(heads, table[0])

    def scaled(self, queries: torch.Tensor, table: Any) -> torch.Tensor:
        factors: torch.Tensor = table[1]
        return (queries * factors).to(queries.dtype)

    def score(self, scores: Scores, table: Any) -> Scores:
        return self._inner.score(scores, table[0])

    def notes(self, table: Any) -> dict[str, Any] | None:
        return self._inner.notes(table[0])


def _none(kind: NoPositions, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
    return Positions()


class Rotary(Positions):
    """Rotary positions: angles, cos and sin in float32, then the compute dtype, as the published models have it."""

    def __init__(self, kind: Rope, dims: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self._theta = kind.base
        self._scaling = kind.bound_scaling
        self._dim = kind.rotated(dims.evaluate(kind.size))
        self._is_interleaved = kind.pairs == "interleaved"
        self._dtype = dtype
        inverse, self._factor = frequencies(self._theta, self._dim, self._scaling)
        self._inverse = inverse.to(device)
        if isinstance(self._scaling, DynamicNTK | LongRope):
            self.exact_sharing_limit = self._scaling.max_position
        if isinstance(self._scaling, LongRope):
            self.recompute_beyond = self._scaling.max_position

    def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, [B, S, 1, R / 2]."""
        angles = places.positions[..., None].float() * self._inverse
        limit = self.exact_sharing_limit
        if limit is not None and int(places.totals.max()) > limit:
            angles = self._grown(places.positions, places.totals)
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        return cos.to(self._dtype)[:, :, None], sin.to(self._dtype)[:, :, None]

    def _grown(self, positions: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Angles where each sequence has the frequencies of its own length."""
        angles = torch.empty((*positions.shape, self._dim // 2), dtype=torch.float32, device=positions.device)
        for total in torch.unique(totals).tolist():
            inverse, _ = frequencies(self._theta, self._dim, self._scaling, length=total)
            chosen = totals == total
            angles[chosen] = positions[chosen][:, None].float() * inverse.to(positions.device)
        return angles

    def rotate(self, heads: torch.Tensor, table: Any) -> torch.Tensor:
        """The first R dims of heads [B, S, N, H] rotated in pairs, in their dtype, by the cos and sin of the table."""
        cos, sin = table[:2]
        x1, x2 = self._pairs(heads)
        if heads.requires_grad:  # `out=` has no derivative
            pairs = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1 if self._is_interleaved else -2)
            return torch.cat([pairs.flatten(-2).to(heads.dtype), heads[..., self._dim :]], -1)
        rotated = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        y1, y2 = self._pairs(rotated)
        torch.sub(x1 * cos, x2 * sin, out=y1)
        torch.add(x2 * cos, x1 * sin, out=y2)
        if self._dim < heads.shape[-1]:
            rotated[..., self._dim :] = heads[..., self._dim :]
        return rotated

    def _pairs(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first and the second dims of the pairs."""
        if self._is_interleaved:
            return heads[..., 0 : self._dim : 2], heads[..., 1 : self._dim : 2]
        half = self._dim // 2
        return heads[..., :half], heads[..., half : self._dim]


class _RecordingRotary(Rotary):
    """Rotary positions whose table has a third part: what the layers note."""

    def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> Any:
        return *super().table(input_ids, places, cache), {}

    def notes(self, table: Any) -> dict[str, Any]:
        noted: dict[str, Any] = table[2]
        return noted


def frequencies(theta: float, dim: int, scaling: Scaling, length: int | None = None) -> tuple[torch.Tensor, float]:
    """`llmkit.architecture.frequencies` with the bits of torch's powers, which transformers has."""
    computed, factor = computed_frequencies(theta, dim, scaling, length, power=_power)
    return torch.from_numpy(computed), factor


def _power(base: float, exponents: Any) -> Any:
    return (base ** torch.from_numpy(exponents)).numpy()


_READERS: Hooks[Positions] = {
    Alibi: AlibiBias,
    CoarseAlibi: _CoarseAlibi,
    NoPositions: _none,
    RecordingRope: _RecordingRotary,
    Rope: Rotary,
}
