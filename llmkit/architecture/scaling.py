"""How rotary frequencies are scaled for longer contexts: one small type for each published method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.keys import as_bool, as_float
from llmkit.errors import SpecError


@dataclass(frozen=True, slots=True)
class NoScaling:
    """The plain frequencies theta^(-2j/R)."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicNTK:
    """A base that grows with the sequence once it is longer than `max_position` (u/emozilla 2023).

    theta' = theta * (factor * L / max_position - (factor - 1)) ** (R / (R - 2)), L = max(length, max_position).
    """

    factor: float
    max_position: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1, Meta 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """NTK-by-parts with a temperature on the attention (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
        attention_factor: multiplies cos and sin; None derives it from factor, mscale and mscale_all_dim.
        truncate: round the borders of the blend outwards to whole dimensions.
    """

    factor: float
    original_max_position: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LongRope:
    """A factor for each frequency, one set up to the original context and one beyond (Ding et al. 2024, LongRoPE).

    Attributes:
        max_position: the original context in tokens: sequences longer than it take `long_factor`.
        attention_factor: multiplies cos and sin.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    max_position: int
    attention_factor: float


@dataclass(frozen=True, slots=True)
class Proportional:
    """The first `share` of the pairs turn, with the frequencies that they have in the whole head (Gemma 4)."""

    share: float
    factor: float


@dataclass(frozen=True, slots=True)
class UnknownScaling:
    """A method that no reader knows; it keeps its name so that a reader can refuse it."""

    name: str


_METHODS: dict[type, str] = {
    NoScaling: "none", LinearScaling: "linear", DynamicNTK: "dynamic", Llama3Scaling: "llama3", Yarn: "yarn",
    LongRope: "longrope", Proportional: "proportional",
}  # fmt: skip


def method_of(scaling: Scaling) -> str:
    """The method as config.json calls it, `none` without one."""
    return scaling.name if isinstance(scaling, UnknownScaling) else _METHODS[type(scaling)]


Scaling = NoScaling | LinearScaling | DynamicNTK | Llama3Scaling | LongRope | Proportional | Yarn | UnknownScaling


def scaling_of(params: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Scaling:
    """The scaling that a config asks for.

    Args:
        params: the object `rope_scaling` (transformers 4: `type` or `rope_type`) or `rope_parameters`
            (transformers 5); None or empty for none.
        config: the whole config, for the context lengths.

    Raises:
        SpecError: the method is known but a parameter it needs is absent.
    """
    if not params:
        return NoScaling()
    if not isinstance(params, Mapping):
        raise SpecError(f"config.json: expected an object for the RoPE scaling, found {params!r}")
    name = params.get("rope_type") or params.get("type") or "default"
    get = _Getter(params, str(name))
    if name == "default":
        return NoScaling()
    if name == "linear":
        return LinearScaling(get.number("factor"))
    if name == "dynamic":
        return DynamicNTK(get.number("factor"), _context(config, get))
    if name == "llama3":
        low, high = get.number("low_freq_factor"), get.number("high_freq_factor")
        if low == high:
            raise SpecError(
                f"config.json: rope_scaling has low_freq_factor and high_freq_factor {low}: nothing between"
            )
        return Llama3Scaling(get.number("factor"), low, high, _original_context(params, config, get))
    if name == "yarn":
        return _yarn(params, config, get)
    if name == "proportional":
        share = get.optional("partial_rotary_factor")
        return Proportional(1.0 if share is None else share, get.optional("factor") or 1.0)
    if name in ("longrope", "su"):
        return _long_rope(params, config, get)
    return UnknownScaling(str(name))


@dataclass(frozen=True, slots=True)
class _Getter:
    params: Mapping[str, Any]
    method: str

    def number(self, key: str) -> float:
        value = self.optional(key)
        if value is None:
            raise SpecError(f"config.json: RoPE scaling {self.method!r} needs {key!r}, which is absent")
        return value

    def optional(self, key: str) -> float | None:
        """A positive number (a weight of zero, for the mscales, is none); None where the key is absent."""
        stated = self.params.get(key)
        if stated is None:
            return None
        value = as_float(stated, f"rope_scaling.{key}")
        if value < 0 or (value == 0 and not key.startswith("mscale")):
            raise SpecError(f"config.json: rope_scaling.{key} is {stated!r}, expected a number above 0")
        return value


def _long_rope(params: Mapping[str, Any], config: Mapping[str, Any], get: _Getter) -> LongRope:
    factors = []
    for key in ("short_factor", "long_factor"):
        found = params.get(key)
        if not isinstance(found, list) or not found:
            raise SpecError(f"config.json: RoPE scaling {get.method!r} needs {key!r}, a list of numbers")
        factors.append(tuple(as_float(x, f"rope_scaling.{key}") for x in found))
    original = _original_context(params, config, get)
    stated = get.optional("attention_factor")
    ratio = get.optional("factor") or _context(config, get) / original
    if stated is None:
        stated = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return LongRope(factors[0], factors[1], original, stated)


def _yarn(params: Mapping[str, Any], config: Mapping[str, Any], get: _Getter) -> Yarn:
    original = _original_context(params, config, get)
    factor = get.optional("factor")
    return Yarn(
        # A null factor means the ratio of the two context lengths.
        factor=_context(config, get) / original if factor is None else factor,
        original_max_position=original,
        attention_factor=get.optional("attention_factor"),
        beta_fast=get.optional("beta_fast") or 32.0,
        beta_slow=get.optional("beta_slow") or 1.0,
        mscale=get.optional("mscale"),
        mscale_all_dim=get.optional("mscale_all_dim"),
        truncate=as_bool(params.get("truncate", True) or False),
    )


def _context(config: Mapping[str, Any], get: _Getter) -> int:
    value = config.get("max_position_embeddings")
    if value is None:
        raise SpecError(f"config.json: RoPE scaling {get.method!r} needs 'max_position_embeddings', which is absent")
    return _positive(value, "max_position_embeddings")


def _positive(value: Any, name: str) -> int:
    number = int(as_float(value, name))
    if number < 1:
        raise SpecError(f"config.json: {name} is {value!r}, expected a positive whole number")
    return number


def _original_context(params: Mapping[str, Any], config: Mapping[str, Any], get: _Getter) -> int:
    # The top-level key wins over the nested one, as in transformers; without either the context counts as original.
    for value in (config.get("original_max_position_embeddings"), params.get("original_max_position_embeddings")):
        if value is not None:
            return _positive(value, "original_max_position_embeddings")
    return _context(config, get)
