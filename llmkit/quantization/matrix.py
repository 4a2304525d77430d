"""A matrix on a grid: codes, scales and what else says which number a code stands for, whatever file stores it.

    w = (code - zero) * scale + offset        or        w = values[code] * scale

Methods make such matrices, codecs read and write them, and a float matrix that was computed from one remembers it
(`matrix_of`), also where its rows were cut, joined or put in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.packing import unpack
from llmkit.quantization.points import Points
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec

# Float32 bytes handled at a time: every pass over a block of rows finds it in the second-level cache.
BLOCK_NBYTES = 2**20


@dataclass(frozen=True, slots=True)
class Grid:
    """Which numbers weights can be, for each group of input columns.

    Attributes:
        bits: of a code: 1 to 8.
        group_size: input columns that share a scale; None for one scale an output row ("per channel").
        is_symmetric: zero is the code 2^(bits-1) everywhere; otherwise each group has a zero point.
        points: what codes stand for, scaled by one number a group; None for integers, evenly spaced.
        lowest_zero: the lowest zero point that methods may choose, as the layout holds it; no part of what the grid is.

    Raises:
        SpecError: bits or a group size that cannot be, or points with zero points or other bits.
    """

    bits: int
    group_size: int | None = None
    is_symmetric: bool = True
    points: Points | None = None
    lowest_zero: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"weights of {self.bits} bits are no grid; expected 1 to 8", hint="--bits 4 or --bits 8")
        if self.group_size is not None and self.group_size < 1:
            raise SpecError(f"group size {self.group_size} is not a positive number of columns")
        if self.points is not None and (self.points.bits != self.bits or not self.is_symmetric):
            raise SpecError(f"{self.points.name} has codes of {self.points.bits} bits and no zero points")

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def half_range(self) -> float:
        """What the largest weight of a group is scaled to, without a zero point: steps, or a value of the points."""
        return self.points.largest if self.points is not None else self.middle - 0.5

    def n_groups(self, n_columns: int) -> int:
        """Scales in a row of `n_columns` weights; the last may be for fewer columns."""
        return 1 if self.group_size is None else -(-n_columns // self.group_size)

    def divides(self, n_columns: int) -> bool:
        """Whether rows of this length fall into whole groups."""
        return self.group_size is None or n_columns % self.group_size == 0

    def __str__(self) -> str:
        groups = "per channel" if self.group_size is None else f"group {self.group_size}"
        if self.points is not None:
            return f"{self.points.name} {groups}"
        return f"int{self.bits} {groups} {'symmetric' if self.is_symmetric else 'asymmetric'}"

    def attrs(self) -> dict[str, Any]:
        """Plain data, for `explain`, the digest and the history."""
        kind = {"type": self.points.name} if self.points is not None else {}
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.is_symmetric, **kind}


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A weight [out, in] on a grid. All parts are lazy, with one row for each output.

    Attributes:
        grid: bits, group size, symmetry, what codes stand for.
        shape: (out, in).
        codes: uint8 [out, n_bytes(in)]: 0 … 2^bits - 1, as of `llmkit.quantization.packing`.
        scales: floats [out, groups].
        zeros: uint8 or floats [out, groups], the code (or what lies between two) that stands for zero; None: the middle
            of a symmetric grid, or 0 where there are offsets.
        offsets: floats [out, groups], added to all columns of a group.
        order: int32 [in], the group of each column; None: they follow each other.
        source: what stores it, in a few words, where the grid does not say it (`Q4_K`).
        has_signed_scales: some may be negative.
        dtype: of the float weights, where it is known.
    """

    grid: Grid
    shape: tuple[int, int]
    codes: Lazy
    scales: Lazy
    zeros: Lazy | None = None
    offsets: Lazy | None = None
    order: Lazy | None = None
    source: str = ""
    has_signed_scales: bool = False
    dtype: DType | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.grid.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.grid.group_size or self.shape[1]

    @property
    def n_groups(self) -> int:
        """Scales in a row."""
        return self.grid.n_groups(self.shape[1])

    def __str__(self) -> str:
        words = self.source or str(self.grid)
        return words if self.order is None else f"{words}, columns in another order"

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """The float matrix [out, in]; it remembers what it comes from.

        Scales are cast to `dtype` and everything is computed in it, as compressed-tensors and ggml do; but with values
        that it does not hold in float32, as bitsandbytes does.

        Args:
            dtype: default: that of the float weights, or of the scales.
        """
        dtype = dtype or self.dtype or self.scales.dtype
        parts = {"zeros": self.zeros, "offsets": self.offsets, "order": self.order}
        optional = {name: part for name, part in parts.items() if part is not None}
        points = self.grid.points

        def fn(codes: torch.Tensor, scales: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            wide = dtype if points is None or not points.is_wide else DType.F32
            restored = self._restored(codes, scales.to(wide.torch), **dict(zip(optional, rest, strict=True)))
            return restored.to(dtype.torch)

        inputs = [self.codes, self.scales, *optional.values()]
        input_rows = [0 if name == "order" else 1 for name in ("codes", "scales", *optional)]
        spec, attrs = TensorSpec(dtype, self.shape), self.grid.attrs()
        node = Decoded("dequantize", inputs, spec, fn, attrs, input_rows=input_rows, scratch=1.0)
        node.matrix, node.source = self, str(self)
        return node.output()

    def _restored(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [rows, in] in the dtype of `scales`, some rows at a time."""
        n_rows, n_in = len(codes), self.shape[1]
        weight = torch.empty((n_rows, n_in), dtype=scales.dtype)
        step = max(BLOCK_NBYTES // (4 * max(n_in, 1)), 1)
        index = order.long() if order is not None else None
        points = self.grid.points
        is_centred = points is None and zeros is None and offsets is None

        def spread(part: torch.Tensor) -> torch.Tensor:
            """Numbers [rows, groups] as ones that go with `q`."""
            part = part.to(scales.dtype)
            return part.unsqueeze(-1) if index is None else part[:, index]

        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            q = unpack(codes[rows], self.bits, n_in)
            values = q.to(scales.dtype) if points is None else points.numbers(q, scales.dtype)
            if index is None:
                values = _grouped(values, self.group)
            if is_centred:
                values = values.sub_(self.grid.middle)
            elif zeros is not None:
                values = values.sub_(spread(zeros[rows]))
            values = values.mul_(spread(scales[rows]))
            if offsets is not None:
                values = values.add_(spread(offsets[rows]))
            weight[rows] = values.flatten(1)[:, :n_in]
        return weight


class Restorable(Protocol):
    """What a float weight can be restored from: a `QuantizedMatrix`, mostly."""

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """The float weight, in the dtype of the scales where none is given."""


@dataclass(frozen=True, eq=False)
class Rearranged:
    """A weight whose elements lie in another order, or shape, than those of the matrix that stores it.

    Attributes:
        matrix: as it is quantized: a group is of neighbours in a row.
        arrange: makes the weight of the dequantized matrix.
    """

    matrix: QuantizedMatrix
    arrange: Callable[[Lazy], Lazy]

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """As of `Restorable`."""
        return self.arrange(self.matrix.dequantized(dtype))


def _grouped(values: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, in] as [rows, groups, group]; what the last group lacks is 0."""
    missing = -values.shape[1] % group
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(len(values), -1, group)


class Decoded(Apply):
    """A float matrix computed from codes.

    Attributes:
        matrix: what it is made of; None where that is no grid.
        source: what stores it, in a few words.
    """

    matrix: QuantizedMatrix | None = None
    source: str = "quantized"


def matrix_of(lazy: Lazy) -> QuantizedMatrix | None:
    """The quantized matrix behind a float one whose rows come from one or several on the same grid; None for others.

    A cast does not matter: codes and scales are what is stored, whatever the product was rounded to.
    """
    node = lazy.node
    if isinstance(node, Decoded):
        return node.matrix
    if node.op == "cast" and node.inputs and node.inputs[0].dtype.is_float and lazy.dtype.is_float:
        return matrix_of(node.inputs[0])
    matrices = [m for m in map(matrix_of, node.inputs) if m is not None]
    if not matrices or len(matrices) != len(node.inputs) or len(node.specs) != 1 or len(lazy.shape) != 2:
        return None
    first = matrices[0]
    if any(_kind(m) != _kind(first) for m in matrices[1:]):
        return None

    def moved(pick: Callable[[QuantizedMatrix], Lazy | None]) -> Lazy | None:
        parts = [part for part in map(pick, matrices) if part is not None]
        return node.over(parts) if parts else None

    codes, scales = moved(lambda m: m.codes), moved(lambda m: m.scales)
    if codes is None or scales is None:
        return None
    zeros, offsets = moved(lambda m: m.zeros), moved(lambda m: m.offsets)
    shape = (lazy.shape[0], first.shape[1])
    return replace(first, shape=shape, codes=codes, scales=scales, zeros=zeros, offsets=offsets)


def _kind(m: QuantizedMatrix) -> tuple[Any, ...]:
    """Equal for two matrices whose rows can be rows of one."""
    dtypes = [part.dtype if part is not None else None for part in (m.scales, m.zeros, m.offsets)]
    return m.grid, m.shape[1], *dtypes, id(m.order) if m.order is not None else None


def dequantized_from(lazy: Lazy) -> str:
    """What stores the codes that a tensor comes from (`IQ2_XXS`; `Q4_K and Q6_K` where it is made of both)."""
    return " and ".join(dict.fromkeys(_sources(lazy)))


def _sources(lazy: Lazy) -> list[str]:
    if isinstance(lazy.node, Decoded):
        return [lazy.node.source]
    return [source for i in lazy.node.inputs for source in _sources(i)]


def is_dequantized(lazy: Lazy) -> bool:
    """Whether a tensor comes from codes at all."""
    return isinstance(lazy.node, Decoded) or any(is_dequantized(i) for i in lazy.node.inputs)
