"""The angular frequencies of rotary positions, for every scaling: the one place that computes them.

The formulas round to float32 after each operation and in the order in which transformers' do (which divides a number
by a tensor as number * (1 / tensor)), so that their bits are the same as long as powers are. Those are left to the
caller: torch's own differ from the exactly rounded ones by one unit in the last place in 1 of 80 (AVX-512, torch 2.13),
so the torch decoder, whose logits shall be transformers', takes torch's. A graph takes the rounded ones, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.architecture.scaling import (
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    NoScaling,
    Proportional,
    Scaling,
    Yarn,
)
from llmkit.errors import RequirementError, SpecError
from llmkit.lazy_imports import np

if TYPE_CHECKING:
    Floats = np.ndarray[Any, np.dtype[np.float32]]
    Real = TypeVar("Real", np.float32, np.float64)
    # (base, exponents) -> base^exponents; base as float32, too.
    Power = Callable[[float, Floats], Floats]


def rounded_power(base: float, exponents: Floats) -> Floats:
    """Powers of a float32 base, computed in double precision and rounded once."""
    powers: Floats = np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)
    return powers


def frequencies(
    theta: float, dim: int, scaling: Scaling, length: int | None = None, *, power: Power = rounded_power
) -> tuple[Floats, float]:
    """The angular frequencies [dim / 2] in float32, and the factor on cos and sin.

    Args:
        theta: the base.
        dim: number of rotated dims R; frequency j is theta^(-2j/R).
        scaling: the method, see `scaling.py`.
        length: length of the sequence in tokens (used by dynamic NTK and longrope).
        power: computes theta^(2j/R).

    Raises:
        RequirementError: an unknown method.
        SpecError: longrope has another number of factors than frequencies.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    one = np.float32(1)
    match scaling:
        case NoScaling():
            return one / power(theta, exponents), 1.0
        case LinearScaling(factor):
            return one / power(theta, exponents) / np.float32(factor), 1.0
        case DynamicNTK(factor, max_position):
            reach = max(length or 0, max_position)
            grown = theta * (factor * reach / max_position - (factor - 1)) ** (dim / (dim - 2))
            return one / power(grown, exponents), 1.0
        case Llama3Scaling():
            return llama3_scaled(one / power(theta, exponents), scaling), 1.0
        case Proportional(share, factor):
            turning = np.arange(dim // 2) < int(share * dim // 2)
            return np.where(turning, one / power(theta, exponents), 0).astype(np.float32) / np.float32(factor), 1.0
        case LongRope():
            return _long(power(theta, exponents), scaling, length), scaling.attention_factor
        case Yarn():
            return _yarn(theta, dim, power(theta, exponents), scaling), yarn_factor(scaling)
    raise RequirementError(
        f"no reader knows the RoPE scaling {scaling.name!r}",
        hint="correct rope_scaling: known are linear, dynamic, llama3, longrope, proportional and yarn",
    )


def _long(powers: Floats, scaling: LongRope, length: int | None) -> Floats:
    is_long = length is not None and length > scaling.max_position
    factors = np.array(scaling.long_factor if is_long else scaling.short_factor, dtype=np.float32)
    if factors.size != powers.size:
        raise SpecError(f"config.json: RoPE scaling 'longrope' has {factors.size} factors, expected {powers.size}")
    return np.float32(1) / (factors * powers)


def llama3_scaled(inverse: np.ndarray[Any, np.dtype[Real]], scaling: Llama3Scaling) -> np.ndarray[Any, np.dtype[Real]]:
    """Frequencies [dim / 2] as Llama 3.1's method changes them, in their own precision: float32 or float64."""
    real = inverse.dtype.type
    one, factor, low = real(1), real(scaling.factor), real(scaling.low_freq_factor)
    wavelength = one / inverse * real(2 * math.pi)
    turns = one / wavelength * real(scaling.original_max_position)
    blend = (turns - low) / real(scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (one - blend) * inverse / factor + blend * inverse
    is_short = turns > real(scaling.high_freq_factor)
    return np.where(turns < low, inverse / factor, np.where(is_short, inverse, blended))


def _yarn(theta: float, dim: int, powers: Floats, scaling: Yarn) -> Floats:
    def dim_of(rotations: float) -> float:
        """The (fractional) dim that completes `rotations` rotations over the original context."""
        return dim * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    one = np.float32(1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = one - np.clip(ramp, 0, 1)
    blended: Floats = one / (np.float32(scaling.factor) * powers) * (one - keep) + one / powers * keep
    return blended


def yarn_factor(scaling: Yarn) -> float:
    """What YaRN multiplies cos and sin by."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_temperature(scaling.factor, scaling.mscale) / yarn_temperature(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_temperature(scaling.factor, 1.0)


def yarn_temperature(factor: float, mscale: float) -> float:
    """What YaRN multiplies queries and keys by, for a context that is `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
