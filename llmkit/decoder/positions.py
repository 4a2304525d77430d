"""The torch reader of the position kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture.keys import as_float
from llmkit.architecture.kinds import Alibi, Kind, NoPositions, Rope
from llmkit.architecture.scaling import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, NoScaling, Scaling, Yarn
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.readers import Readers, reader_of
from llmkit.errors import RequirementError, SpecError

if TYPE_CHECKING:
    import torch

    from llmkit.decoder.kv import Cache, Places
    from llmkit.decoder.scores import Scores

__all__ = ["AlibiBias", "Positions", "Rotary", "alibi_slopes", "build_positions", "frequencies", "limits"]


class Positions:
    """What a position kind does; this one does nothing, others override what they need."""

    exact_sharing_limit: int | None = None
    """The longest sequence whose prefix gives the same keys whatever follows; None for any length."""
    rebuilt_past: int | None = None
    """A sequence that grows past this many tokens needs the keys of all of them anew; None for never."""

    def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> Any:
        """What one forward pass needs, for all layers.

        Args:
            input_ids: [B, S] the new tokens.
            places: where they stand.
            cache: its `memory` keeps what later passes need to know of these tokens.
        """
        return None

    def turn(self, heads: torch.Tensor, table: Any) -> torch.Tensor:
        """Heads [B, S, n, head_dim] of queries and keys with their positions."""
        return heads

    def score(self, scores: Scores, table: Any) -> Scores:
        """How scores are made, with what the positions add."""
        return scores


def build_positions(kind: Kind, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
    """The reader of a position kind.

    Raises:
        RequirementError: no torch reader for the kind or its scaling.
    """
    made: Positions = reader_of(kind, _READERS)(kind, dims, dtype, device)
    return made


def limits(readers: Iterable[Positions]) -> tuple[int | None, int | None]:
    """The strictest `exact_sharing_limit` and `rebuilt_past` of several readers; None for none."""
    found = list(readers)
    sharing = [r.exact_sharing_limit for r in found if r.exact_sharing_limit is not None]
    rebuilt = [r.rebuilt_past for r in found if r.rebuilt_past is not None]
    return min(sharing, default=None), min(rebuilt, default=None)


def alibi_slopes(n_heads: int) -> list[float]:
    """The slopes of the paper, [n_heads]: a geometric series for a power of two, and every other one of the next."""
    whole = 2 ** math.floor(math.log2(n_heads))
    ratio, between = 2.0 ** (-8.0 / whole), 2.0 ** (-8.0 / (2 * whole))
    slopes = [ratio ** (i + 1) for i in range(whole)]
    return slopes + [between ** (2 * i + 1) for i in range(n_heads - whole)]


class AlibiBias(Positions):
    """Linear biases by the position of the key, float32."""

    def __init__(self, kind: Alibi, dims: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        self._slopes = torch.tensor(alibi_slopes(dims.heads), device=device)

    def bias(self, positions: torch.Tensor) -> torch.Tensor:
        """[B, T] positions -> [B, heads, T]."""
        return self._slopes[:, None] * positions[:, None].float()

    def score(self, scores: Scores, table: Any) -> Scores:
        return replace(scores, key_bias=self.bias)


def _none(kind: NoPositions, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
    return Positions()


class Rotary(Positions):
    """Rotary positions: angles, cos and sin in float32, then the compute dtype, as the published models have it."""

    def __init__(self, kind: Rope, dims: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self._theta = as_float(kind.theta)
        self._scaling = kind.bound_scaling
        self._dim = kind.rotated(dims.head_dim)
        self._is_interleaved = kind.pairs == "interleaved"
        self._dtype = dtype
        inverse, self._factor = frequencies(self._theta, self._dim, self._scaling)
        self._inverse = inverse.to(device)
        if isinstance(self._scaling, DynamicNTK | LongRope):
            self.exact_sharing_limit = self._scaling.max_position
        if isinstance(self._scaling, LongRope):
            self.rebuilt_past = self._scaling.max_position

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
        import torch

        angles = torch.empty((*positions.shape, self._dim // 2), dtype=torch.float32, device=positions.device)
        for total in torch.unique(totals).tolist():
            inverse, _ = frequencies(self._theta, self._dim, self._scaling, length=total)
            chosen = totals == total
            angles[chosen] = positions[chosen][:, None].float() * inverse.to(positions.device)
        return angles

    def turn(self, heads: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The first R dims of each head rotated in pairs."""
        import torch

        cos, sin = table
        turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        (x1, x2), (y1, y2) = self._pairs(heads), self._pairs(turned)
        torch.sub(x1 * cos, x2 * sin, out=y1)
        torch.add(x2 * cos, x1 * sin, out=y2)
        if self._dim < heads.shape[-1]:
            turned[..., self._dim :] = heads[..., self._dim :]
        return turned

    def _pairs(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first and the second dims of the pairs."""
        if self._is_interleaved:
            return heads[..., 0 : self._dim : 2], heads[..., 1 : self._dim : 2]
        half = self._dim // 2
        return heads[..., :half], heads[..., half : self._dim]


def frequencies(theta: float, dim: int, scaling: Scaling, length: int | None = None) -> tuple[torch.Tensor, float]:
    """The angular frequencies [dim / 2] in float32, and the factor on cos and sin.

    Args:
        theta: the base.
        dim: number of rotated dims R; frequency j is theta^(-2j/R).
        scaling: the method, see `architecture/scaling.py`.
        length: length of the sequence in tokens (used by dynamic NTK).

    Raises:
        RequirementError: an unknown method.
    """
    import torch

    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    match scaling:
        case NoScaling():
            return 1.0 / theta**exponent, 1.0
        case LinearScaling(factor):
            return 1.0 / theta**exponent / factor, 1.0
        case DynamicNTK(factor, max_position):
            reach = max(length or 0, max_position)
            grown = theta * (factor * reach / max_position - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / grown**exponent, 1.0
        case Llama3Scaling():
            return _llama3(1.0 / theta**exponent, scaling), 1.0
        case LongRope():
            return _long(1.0 / theta**exponent, scaling, length), scaling.attention_factor
        case Yarn():
            return _yarn(theta, dim, theta**exponent, scaling), _yarn_factor(scaling)
    raise RequirementError(
        f"the torch decoder does not know the RoPE scaling {scaling.name!r}",
        hint="it knows linear, dynamic, llama3, longrope and yarn",
    )


def _long(inverse: torch.Tensor, scaling: LongRope, length: int | None) -> torch.Tensor:
    import torch

    is_long = length is not None and length > scaling.max_position
    factors = torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
    if factors.numel() != inverse.numel():
        raise SpecError(
            f"config.json: RoPE scaling 'longrope' has {factors.numel()} factors, expected {inverse.numel()}"
        )
    return inverse / factors


def _llama3(inverse: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    import torch

    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position / wavelength
    blend = (turns - low) / (high - low)
    blended = (1 - blend) * inverse / scaling.factor + blend * inverse
    long, short = turns < low, turns > high
    return torch.where(long, inverse / scaling.factor, torch.where(short, inverse, blended))


def _yarn(theta: float, dim: int, powers: torch.Tensor, scaling: Yarn) -> torch.Tensor:
    import torch

    def dim_of(rotations: float) -> float:
        """The (fractional) dim that turns `rotations` times over the original context."""
        return dim * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_factor(scaling: Yarn) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


_READERS: Readers = {Rope: Rotary, Alibi: AlibiBias, NoPositions: _none}
