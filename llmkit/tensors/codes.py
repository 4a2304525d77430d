"""The integers behind a float matrix: a `Decoded` tensor remembers the codes, scales and zero points it is made from.

Who can compute with the codes themselves asks `codes_of`, and gets them also where rows were taken, joined or put into
another order on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType

__all__ = ["Codes", "Decoded", "codes_of", "is_decoded"]


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix [out, in] as (code - zero point) * scale, computed in float32.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale and a zero point; divides `columns`.
        columns: `in`.
        values: uint8 [out, ceil(in * bits / 8)]: codes 0 … 2^bits - 1, of two in a byte the first in the low bits.
        scales: floats [out, in / group].
        zeros: uint8 [out, in / group], a zero point a byte; None: 2^(bits-1) everywhere.
        source: in a few words what stored them so (`Q4_0`, `int4 group 64 symmetric`).
    """

    bits: int
    group: int
    columns: int
    values: Lazy
    scales: Lazy
    zeros: Lazy | None
    source: str

    @property
    def n_rows(self) -> int:
        """`out`."""
        return self.values.spec.n_rows


class Decoded(Apply):
    """A float matrix computed from codes; `codes` is None where its format is none that `Codes` describes."""

    codes: Codes | None = None


def codes_of(lazy: Lazy) -> Codes | None:
    """The codes of a matrix whose rows come from one quantized matrix or several of the same kind; None for others.

    A cast does not matter: codes and scales are what is stored, whatever the product was rounded to.
    """
    node = lazy.node
    if isinstance(node, Decoded):
        return node.codes
    if node.op == "cast" and node.inputs and node.inputs[0].dtype.is_float and lazy.dtype.is_float:
        return codes_of(node.inputs[0])
    parts = [codes_of(i) for i in node.inputs]
    found = [p for p in parts if p is not None]
    if not found or len(found) != len(parts) or len(node.specs) != 1:
        return None
    first = found[0]
    if any(_kind(p) != _kind(first) for p in found[1:]):
        return None

    def moved(pick: Callable[[Codes], Lazy | None]) -> Lazy | None:
        chosen = [pick(p) for p in found]
        given = [c for c in chosen if c is not None]
        return node.over(given) if given else None

    values, scales = moved(lambda p: p.values), moved(lambda p: p.scales)
    if values is None or scales is None:
        return None
    return replace(first, values=values, scales=scales, zeros=moved(lambda p: p.zeros))


def _kind(codes: Codes) -> tuple[int, int, int, bool, DType]:
    return codes.bits, codes.group, codes.columns, codes.zeros is None, codes.scales.dtype


def is_decoded(lazy: Lazy) -> bool:
    """Whether a tensor comes from integers at all."""
    return isinstance(lazy.node, Decoded) or any(is_decoded(i) for i in lazy.node.inputs)
