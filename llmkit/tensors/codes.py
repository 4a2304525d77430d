"""The integers behind a float matrix: a `Decoded` tensor remembers the codes, scales and zero points it is made from.

Who can compute with the codes themselves asks `codes_of`, and gets them also where rows were taken, joined or put into
another order on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType

__all__ = ["Codes", "Decoded", "codes_of", "decoded_from", "is_decoded"]


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix [out, in] as (code - zero point) * scale, or (code - base) * scale + offset, computed in float32.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale and a zero point; divides `columns`.
        columns: `in`.
        values: uint8 [out, ceil(in * bits / 8)]: codes 0 … 2^bits - 1, of two in a byte the first in the low bits.
        scales: floats [out, in / group].
        zeros: uint8 [out, in / group], a zero point a byte; None: 2^(bits-1) everywhere.
        source: in a few words what stored them so (`Q4_0`, `int4 group 64 symmetric`).
        offsets: floats [out, in / group], what is added to all columns of a group; there are no zero points then.
        base: the code that stands for the offset alone.
    """

    bits: int
    group: int
    columns: int
    values: Lazy
    scales: Lazy
    zeros: Lazy | None
    source: str
    offsets: Lazy | None = None
    base: int = 0

    @property
    def n_rows(self) -> int:
        """`out`."""
        return self.values.spec.n_rows


class Decoded(Apply):
    """A float matrix computed from codes; `codes` is None where its format is none that `Codes` describes.

    Attributes:
        source: what stores it so, as of `Codes`.
    """

    codes: Codes | None = None
    source: str = "quantized"


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
    zeros, offsets = moved(lambda p: p.zeros), moved(lambda p: p.offsets)
    return replace(first, values=values, scales=scales, zeros=zeros, offsets=offsets)


def _kind(codes: Codes) -> tuple[int, int, int, bool, bool, int, DType]:
    grid = codes.bits, codes.group, codes.columns
    return *grid, codes.zeros is None, codes.offsets is None, codes.base, codes.scales.dtype


def decoded_from(lazy: Lazy) -> str:
    """What stores the integers that a tensor comes from (`IQ2_XXS`; `Q4_K and Q6_K` where it is made of both)."""
    return " and ".join(dict.fromkeys(_sources(lazy)))


def _sources(lazy: Lazy) -> list[str]:
    if isinstance(lazy.node, Decoded):
        return [lazy.node.source]
    return [source for i in lazy.node.inputs for source in _sources(i)]


def is_decoded(lazy: Lazy) -> bool:
    """Whether a tensor comes from integers at all."""
    return isinstance(lazy.node, Decoded) or any(is_decoded(i) for i in lazy.node.inputs)
