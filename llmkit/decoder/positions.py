"""The torch reader of the position kinds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from llmkit.architecture.keys import as_float
from llmkit.architecture.kinds import Kind, Rope
from llmkit.architecture.scaling import DynamicNTK, LinearScaling, Llama3Scaling, NoScaling, Scaling, Yarn
from llmkit.decoder.readers import Readers, reader_of
from llmkit.errors import RequirementError

if TYPE_CHECKING:
    import torch

    Table = tuple[torch.Tensor, torch.Tensor]

__all__ = ["Positions", "Rotary", "build_positions", "frequencies"]


class Positions(Protocol):
    """What a position kind does to the heads of queries and keys."""

    exact_sharing_limit: int | None
    """The longest sequence whose prefix gives the same keys whatever follows; None for any length."""

    def table(self, positions: torch.Tensor, totals: torch.Tensor) -> Table:
        """What one forward pass needs, for all layers.

        Args:
            positions: [B, S] int64, the position of each token.
            totals: [B, S] int64, the length of the whole sequence that the token belongs to.
        """

    def apply(self, heads: torch.Tensor, table: Table) -> torch.Tensor:
        """Heads [B, S, n, head_dim] with their positions."""


def build_positions(kind: Kind, head_dim: int, dtype: torch.dtype, device: torch.device) -> Positions:
    """The reader of a position kind.

    Raises:
        RequirementError: no torch reader for the kind or its scaling.
    """
    made: Positions = reader_of(kind, _READERS)(kind, head_dim, dtype, device)
    return made


class Rotary:
    """Rotary positions: angles, cos and sin in float32, then the compute dtype, as the published models have it."""

    def __init__(self, kind: Rope, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._theta = as_float(kind.theta)
        self._scaling = kind.bound_scaling
        self._dim = head_dim
        self._dtype = dtype
        self._device = device
        inverse, self._factor = frequencies(self._theta, head_dim, self._scaling)
        self._inverse = inverse.to(device)
        self.exact_sharing_limit = self._scaling.max_position if isinstance(self._scaling, DynamicNTK) else None

    def table(self, positions: torch.Tensor, totals: torch.Tensor) -> Table:
        """Cos and sin, [B, S, 1, head_dim / 2]."""
        angles = positions[..., None].float() * self._inverse
        if isinstance(self._scaling, DynamicNTK) and int(totals.max()) > self._scaling.max_position:
            angles = self._grown(positions, totals)
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        return cos.to(self._dtype)[:, :, None], sin.to(self._dtype)[:, :, None]

    def _grown(self, positions: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Angles where each sequence has the base of its own length."""
        import torch

        angles = torch.empty((*positions.shape, self._dim // 2), dtype=torch.float32, device=positions.device)
        for total in torch.unique(totals).tolist():
            inverse, _ = frequencies(self._theta, self._dim, self._scaling, length=total)
            chosen = totals == total
            angles[chosen] = positions[chosen][:, None].float() * inverse.to(positions.device)
        return angles

    def apply(self, heads: torch.Tensor, table: Table) -> torch.Tensor:
        """The first half of each head's dims rotated against the second."""
        import torch

        cos, sin = table
        half = self._dim // 2
        x1, x2 = heads[..., :half], heads[..., half:]
        turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        torch.sub(x1 * cos, x2 * sin, out=turned[..., :half])
        torch.add(x2 * cos, x1 * sin, out=turned[..., half:])
        return turned


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
        case Yarn():
            return _yarn(theta, dim, theta**exponent, scaling), _yarn_factor(scaling)
    raise RequirementError(
        f"the torch decoder does not know the RoPE scaling {scaling.name!r}",
        hint="it knows linear, dynamic, llama3 and yarn",
    )


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


_READERS: Readers = {Rope: Rotary}
