"""How a decoder knows the order of tokens: rotary, ALiBi, learned, or not at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from llmkit.architecture.keys import Computed, Key, Number, as_float
from llmkit.architecture.kind import Kind, SlotShape
from llmkit.architecture.scaling import NoScaling, Scaling, scaling_of
from llmkit.errors import SpecError

# transformers 4 writes rope_theta and rope_scaling, transformers 5 one object; what is inside the object wins.
THETA_KEYS = ("rope_scaling.rope_theta", "rope_parameters.rope_theta", "rope_theta")
_THETA = Key(THETA_KEYS, 10000.0)
_SCALING = Key(("rope_scaling", "rope_parameters"), None)


def rotated_share(default: float, *others: str) -> Key:
    """The rotated share of a head: `partial_rotary_factor` (transformers 5 nests it), or others; null is all of it."""
    name = "partial_rotary_factor"
    return Key((f"rope_scaling.{name}", f"rope_parameters.{name}", name, *others), default, null=1.0)


@dataclass(frozen=True)
class QueryGrowth(Kind):
    """Queries times 1 + beta ln(1 + floor((p + first) / length)) at position p (Nakanishi 2025, arXiv:2501.19399).

    Attributes:
        beta: the slope (Llama 4's `attn_scale`).
        length: the context that the model was trained for at first, in tokens.
        first: what the first position counts.
    """

    string_keys = ("beta", "length")

    beta: Number
    length: Number
    first: int = 0

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Beta, length and first of a bound kind."""
        return as_float(self.beta), as_float(self.length), float(self.first)


@dataclass(frozen=True)
class NoPositions(Kind):
    """Attention does not see the order of tokens (the embedding may), but for queries that grow."""

    growth: QueryGrowth | None = None


@dataclass(frozen=True)
class Rope(Kind):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        theta: the base of the frequencies.
        scaling: where the config keeps the scaling; bound, one of the types of `scaling.py`.
        share: the part of each head's dims that is rotated, the first int(head_dim * share); the rest passes through.
        pairs: `half` pairs dim j with j + R/2, `interleaved` dim 2j with 2j + 1 (R rotated dims).
        size: a formula: the width of a head.
        growth: of queries, after they are rotated; None for none.
    """

    string_keys = ("theta",)

    theta: Number = _THETA
    scaling: Key | Computed | Scaling = _SCALING
    share: Number = 1.0
    pairs: Literal["half", "interleaved"] = "half"
    size: str = dataclasses.field(default="head_dim", kw_only=True)
    growth: QueryGrowth | None = dataclasses.field(default=None, kw_only=True)

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        if as_float(bound.theta) <= 0:
            raise SpecError(f"config.json: rope_theta is {bound.theta!r}, expected a number above 0")
        if isinstance(self.scaling, Key):
            params: Any = bound.scaling
            return dataclasses.replace(bound, scaling=scaling_of(params, config))
        return bound

    @property
    def base(self) -> float:
        """The base of a bound kind."""
        return as_float(self.theta)

    @property
    def bound_scaling(self) -> Scaling:
        """The scaling of a bound kind."""
        return NoScaling() if isinstance(self.scaling, Key | Computed) else self.scaling

    def rotated(self, head_dim: int) -> int:
        """The number R of rotated dims of a head.

        Raises:
            SpecError: it is odd, or outside 2..head_dim.
        """
        dims = int(head_dim * as_float(self.share))
        if dims % 2 or not 2 <= dims <= head_dim:
            raise SpecError(f"config.json: rotary positions would turn {dims} of the {head_dim} dims of a head")
        return dims


@dataclass(frozen=True)
class Alibi(Kind):
    """Attention with linear biases: slope_h * j is added to the score of key j (Press et al. 2021, arXiv:2108.12409).

    Softmax does not see a shift, so this equals slope_h * (j - i). Slopes are the paper's for any number of heads.

    Attributes:
        steepness: the flattest slope is 2^-steepness where the heads are a power of two; 8 in the paper.
    """

    steepness: Number = 8

    def slopes(self, n_heads: int) -> list[float]:
        """The slopes of a bound kind, [n_heads]."""
        return alibi_slopes(n_heads, as_float(self.steepness))


@dataclass(frozen=True)
class CoarseAlibi(Kind):
    """ALiBi added before the scores are scaled, slopes and products rounded to bfloat16 whatever the compute dtype.

    Rounded products grow in steps (of 8 from 1024 on): they are not those of a shifted
    position, and the bias of a key depends on its absolute position.
    """


def alibi_slopes(n_heads: int, steepness: float = 8.0) -> list[float]:
    """The slopes of the paper, [n_heads]: a geometric series for a power of two, and every other one of the next."""
    power = 2 ** math.floor(math.log2(n_heads))
    ratio, between = 2.0 ** (-steepness / power), 2.0 ** (-steepness / (2 * power))
    slopes = [ratio ** (i + 1) for i in range(power)]
    return slopes + [between ** (2 * i + 1) for i in range(n_heads - power)]


@dataclass(frozen=True)
class LearnedPositions(Kind):
    """A row of a trained table for each position, added to the embedding.

    Attributes:
        rows: a formula: the number of rows of the table.
        offset: position p has row p + offset.
    """

    rows: str = "context"
    offset: int = 0

    def slots(self) -> dict[str, SlotShape]:
        return {"weight": SlotShape((self.rows, "hidden"), "embedding")}


@dataclass(frozen=True)
class SinusoidalPositions(Kind):
    """Sines, then cosines, of each position, added to the embedding (Vaswani et al. 2017, as in tensor2tensor).

    Of W dims, dim j of either half has the angle p * 10000^(-j / (W/2 - 1)); an odd last dim is zero.

    Attributes:
        offset: position p counts as p + offset.
        empty: the one of those whose row is zero (a padding token's, whatever stands there); None for none.
    """

    offset: int = 0
    empty: Number | None = None

    @property
    def empty_row(self) -> int | None:
        """The empty row of a bound kind."""
        return None if self.empty is None else int(as_float(self.empty))


def sinusoidal_frequencies(width: int) -> list[float]:
    """The angular frequencies of `SinusoidalPositions`, [width // 2]."""
    half = width // 2
    return [math.exp(-j * math.log(10000) / max(half - 1, 1)) for j in range(half)]
