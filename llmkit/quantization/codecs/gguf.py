"""Blocks of GGUF files: read and dequantized row by row, written from matrices on their grids, or from floats.

Blocks are made floats by `gguf.quants`, so that the bits are those of the gguf library; what it does not have, by the
grid of the type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.formats.gguf_header import GgufFile, GgufTensor
from llmkit.formats.gguf_types import TYPE_BY_NAME, GgufType
from llmkit.lazy_imports import np, torch
from llmkit.quantization.codec import Codec
from llmkit.quantization.codecs.gguf_grids import GRIDS
from llmkit.quantization.codecs.gguf_rounding import rounded
from llmkit.quantization.codecs.gguf_search import search_blocks
from llmkit.quantization.matrix import Decoded, Grid, QuantizedMatrix, matrix_of
from llmkit.quantization.packing import n_bytes, pack, unpack
from llmkit.quantization.points import MXFP4, Points
from llmkit.quantization.statistics import MEASURE
from llmkit.tensors.finite import require_finite
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.moving import Stack
from llmkit.tensors.spec import DType, TensorSpec

DEQUANTIZE, QUANTIZE = "dequantize blocks", "quantize blocks"


class GgufBlocks(Codec):
    """Rows of blocks, each with its scale; all types that are a grid or a table are read."""

    name = "gguf"
    bits = (2, 3, 4, 5, 6, 8)
    group_sizes = (32,)
    holds_zeros = False
    holds_offsets = True

    def type_of(self, matrix: QuantizedMatrix) -> str | None:
        """The type of blocks that holds a matrix value for value: of the fewest bits; None for none.

        Codes around a middle may have more bits than they use, and a group may be of several blocks; scales are float16
        there, which those of other dtypes have to be equal to: they are read for that.
        """
        has_offsets = matrix.offsets is not None
        bits = next((b for b in (4, 5, 8) if b >= matrix.bits), None)
        name = f"Q{bits}_{'1' if has_offsets else '0'}"
        fits = matrix.group % 32 == 0 and name in _PLAIN and not (has_offsets and bits != matrix.bits)
        parts = [part for part in (matrix.scales, matrix.offsets) if part is not None]
        return name if fits and all(map(_is_half, parts)) else None

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        why = super().refuses(matrix)
        return why or (None if self.type_of(matrix) else "GGUF has no such blocks, or not with such scales")

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        """The rows of blocks, uint8 [out, bytes], as one tensor without an end of its own."""
        return {"": _blocks(matrix, str(self.type_of(matrix)))}

    def settings(self, matrix: QuantizedMatrix) -> dict[str, Any]:
        return {"type": self.type_of(matrix)}

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        """The matrix of raw bytes, uint8 [out, bytes of a row], and its `type`."""
        raw, kind = parts[""], TYPE_BY_NAME[settings["type"]]
        layout = GRIDS.get(kind.name)
        if layout is None:
            raise SpecError(f"{kind.name} is no grid")
        n_out, n_in = raw.spec.n_rows, raw.spec.row_nbytes // kind.nbytes * kind.block
        n_groups, bits, attrs = n_in // layout.group, layout.bits, {"type": kind.name}

        def of_blocks(unpacked: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: unpacked(x.view(len(x), -1, kind.nbytes)).reshape(len(x), -1)

        def codes(x: torch.Tensor) -> torch.Tensor:
            q = layout.codes.read(x.view(len(x), -1, kind.nbytes))
            return pack(q.reshape(len(x), n_in), bits)

        def part(op: str, fn: Callable[[torch.Tensor], torch.Tensor], dtype: DType, n: int) -> Lazy:
            return Apply(op, [raw], TensorSpec(dtype, (n_out, n)), fn, attrs, scratch=1.0).output()

        minima = (
            part("minima", of_blocks(layout.minima), layout.scale_dtype, n_groups) if layout.e is not None else None
        )
        points = Points(kind.name.lower(), bits, tuple(map(float, layout.table))) if layout.table is not None else None
        return QuantizedMatrix(
            Grid(bits, layout.group, minima is None, points),
            (n_out, n_in),
            part("codes", codes, DType.U8, n_bytes(n_in, bits)),
            part("scales", of_blocks(layout.scales), layout.scale_dtype, n_groups),
            offsets=minima,
            source=kind.name,
            has_signed_scales=kind.name != "Q8_0",  # what has the largest size, whatever its sign, has the last code
        )


CODEC = GgufBlocks()


def as_blocks(lazy: Lazy) -> tuple[str, Lazy] | None:
    """A float matrix as the blocks that are it value for value: those that it is read from, or that hold its grid.

    Returns:
        The type and the bytes, uint8 [out, bytes of a row]; None where no blocks are known to hold it.
    """
    stored = _stored_blocks(lazy)
    if stored is not None:
        return stored
    if isinstance(lazy.node, Stack):
        each = [blocks for blocks in map(as_blocks, lazy.node.inputs) if blocks is not None]
        is_same = len(each) == len(lazy.node.inputs) and len({kind for kind, _ in each}) == 1
        return (each[0][0], Stack([raw for _, raw in each]).output()) if is_same else None
    matrix = matrix_of(lazy)
    kind = _holding(matrix) if matrix is not None else None
    return None if matrix is None or kind is None else (kind, _blocks(matrix, kind))


def _holding(matrix: QuantizedMatrix) -> str | None:
    """The type of blocks that holds a matrix value for value; None for none."""
    if matrix.grid.points != MXFP4:
        return CODEC.type_of(matrix) if Codec.refuses(CODEC, matrix) is None else None
    is_whole = matrix.group == 32 and matrix.order is None and matrix.shape[1] % 32 == 0
    return "MXFP4" if is_whole and _are_powers(matrix.scales) else None


def _stored_blocks(lazy: Lazy) -> tuple[str, Lazy] | None:
    """The blocks that a matrix is dequantized from, in whatever order its rows are now."""
    node = lazy.node
    if node.op == DEQUANTIZE:
        return str(node.attrs["type"]), node.inputs[0]
    if node.op == "cast" and lazy.dtype.is_float:
        return _stored_blocks(node.inputs[0])
    parts = [blocks for blocks in map(_stored_blocks, node.inputs) if blocks is not None]
    if not parts or len(parts) != len(node.inputs) or len({kind for kind, _ in parts}) > 1:
        return None
    if len(lazy.shape) != 2 and not isinstance(node, Stack):
        return None
    moved = node.over([raw for _, raw in parts])
    return None if moved is None else (parts[0][0], moved)


def _blocks(matrix: QuantizedMatrix, kind_name: str) -> Lazy:
    kind, grid, (n_out, n_in) = TYPE_BY_NAME[kind_name], GRIDS[kind_name], matrix.shape
    halves = [part for part in (matrix.scales, matrix.offsets) if part is not None]
    n_blocks = matrix.group // kind.block  # of a group
    is_integer = matrix.offsets is None and matrix.grid.points is None
    shift = 0 if not is_integer else (1 << grid.bits - 1) - matrix.grid.middle

    def fn(codes: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        q = (unpack(codes, matrix.bits, n_in) + shift).view(-1, kind.block)
        stored = [_exponents(part) if grid.has_power else part.to(torch.float16) for part in numbers]
        spread = [part.repeat_interleave(n_blocks, dim=1).view(-1) for part in stored]
        return grid.pack(q, spread).view(len(codes), -1)

    spec = TensorSpec(DType.U8, (n_out, kind.row_nbytes(n_in)))
    return Apply("blocks", [matrix.codes, *halves], spec, fn, {"type": kind.name}, scratch=2.0).output()


def _is_half(numbers: Lazy) -> bool:
    """Whether all numbers are float16 ones."""
    if numbers.dtype is DType.F16:
        return True
    values = numbers.load().float()
    return bool(torch.equal(values.half().float(), values))


def _exponents(powers: torch.Tensor) -> torch.Tensor:
    """The bytes of E8M0 that powers of two have, uint8: the exponent plus 127."""
    return (torch.frexp(powers).exponent + 126).to(torch.uint8)


def _are_powers(numbers: Lazy) -> bool:
    """Whether all numbers are powers of two."""
    return bool((torch.frexp(numbers.load().float()).mantissa == 0.5).all())


# Written by plain rounding, as the gguf library does, and matrices of other layouts code for code.
_PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_BY_GRID = ("Q1_0", "Q2_0")  # which the gguf library does not dequantize


def stored_tensor(file: GgufFile, tensor: GgufTensor) -> Lazy:
    """The tensor as floats: plain types as they are, blocks as float32.

    Raises:
        RequirementError: a type that nothing here dequantizes.
    """
    kind, shape = tensor.type, tensor.shape
    if kind.dtype is not None:
        return Read(tensor.name, TensorSpec(kind.dtype, shape), file.source, tensor.offset).output()
    if not kind.is_known:
        raise RequirementError(
            f"{file.source.path}: {tensor.name} is {kind.name}, which is not dequantized",
            hint="take a file of another quantization",
        )
    if len(shape) == 3:  # experts: each a matrix of its own
        nbytes = tensor.nbytes // shape[0]
        each = [replace(tensor, shape=shape[1:], offset=tensor.offset + i * nbytes) for i in range(shape[0])]
        return Stack([stored_tensor(file, part) for part in each]).output()
    # A row of the raw bytes for each row of the tensor; a vector is one row.
    rows = shape[0] if len(shape) > 1 else 1
    raw = TensorSpec(DType.U8, (rows, tensor.nbytes // rows))
    read = Read(tensor.name, raw, file.source, tensor.offset).output()
    step = 1 if len(shape) > 1 else None
    spec = TensorSpec(DType.F32, shape)
    node = Decoded(DEQUANTIZE, [read], spec, _dequantize(kind, shape), {"type": kind.name}, row_step=step)
    node.source = kind.name
    if len(shape) == 2 and kind.name in GRIDS:
        node.matrix = CODEC.read({"": read}, {"type": kind.name}, (shape[0], shape[1]))
    return node.output()


def _dequantize(kind: GgufType, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def fn(raw: torch.Tensor) -> torch.Tensor:
        rows = raw.view(-1, kind.row_nbytes(shape[-1]))
        if kind.name in _BY_GRID:
            values = GRIDS[kind.name].floats(rows.view(len(rows), -1, kind.nbytes)).flatten(1)
        else:
            from gguf import GGMLQuantizationType, quants

            with np.errstate(all="ignore"):  # damaged scales become NaN, and large ones infinite: no warning
                values = torch.from_numpy(quants.dequantize(rows.numpy(), GGMLQuantizationType(kind.code)))
        return values.view(-1, *shape[1:]) if len(shape) > 1 else values.view(shape)

    return fn


def quantized(lazy: Lazy, kind_name: str, name: str, importance: Lazy | None = None) -> Lazy:
    """A matrix as the bytes of its rows in blocks of type `kind_name`, which the row length is a multiple of.

    Types without integers beside their scales are rounded as the gguf library does, where nothing was measured.

    Args:
        name: the matrix's, for messages.
        importance: float32 [in], in proportion to the mean of x^2 of each input channel.

    Returns:
        uint8 [..., bytes of a row]. Evaluated, it raises InputError where a block's scale is not finite.
    """
    kind, grid = TYPE_BY_NAME[kind_name], GRIDS[kind_name]
    spec = TensorSpec(DType.U8, (*lazy.shape[:-1], kind.row_nbytes(lazy.shape[-1])))
    is_plain = kind_name in _PLAIN and (importance is None or grid.bits == 8)

    def fn(x: torch.Tensor, squares: torch.Tensor | None = None) -> torch.Tensor:
        if not is_plain:  # there one NaN is one of a scale
            require_finite(x, x.sum(-1, dtype=torch.float32), name=name)
        if squares is not None and not bool(torch.isfinite(squares.sum()) and squares.min() >= 0):
            what = "squares below 0" if bool(torch.isfinite(squares.sum())) else "NaN or infinities"
            raise InputError(f"{name}: what was measured of its inputs holds {what}", hint=MEASURE)
        made = []
        for blocks in rounded(x.float(), grid) if is_plain else search_blocks(x.float(), grid, squares):
            require_finite(x, *blocks.halves, name=name)
            made.append(grid.pack(*blocks))
        return torch.cat(made).view(*x.shape[:-1], -1)

    inputs = [lazy] if is_plain or importance is None else [lazy, importance]
    rows = [1] if len(inputs) == 1 else [1, 0]
    return Apply(QUANTIZE, inputs, spec, fn, {"type": kind_name}, input_rows=rows, scratch=4.0).output()
