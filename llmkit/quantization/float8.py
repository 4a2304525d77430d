"""Matrices of 8-bit floats with a scale for each row, block of rows and columns, or all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.errors import RequirementError, SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import REMEDY
from llmkit.quantization.matrix import Decoded, Grid, QuantizedMatrix
from llmkit.quantization.points import FP8
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import sliceable, view_as
from llmkit.tensors.spec import DType, TensorSpec

FLOAT8 = (DType.F8_E4M3, DType.F8_E5M2)
_EXPONENTS = (DType.U8, DType.F8_E8M0)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """What bytes of E8M0 stand for: 2^(byte - 127), float32 of the same shape."""
    return (exponents.float() - 127).exp2()


def powers_of_two(exponents: Lazy, shape: tuple[int, ...]) -> Lazy:
    """The numbers that bytes of E8M0 stand for, float32 of this shape."""
    return Apply("powers", [view_as(exponents, DType.U8, shape)], TensorSpec(DType.F32, shape), _powers).output()


@dataclass(frozen=True, eq=False)
class ScaledFloats:
    """A weight that is stored in float8.

    Attributes:
        values: float8 [out, in].
        scales: one for all (no dimension, or one entry), or [blocks of rows, blocks of columns].
        block: rows and columns of a block; the last ones may be cut.
        is_wide: multiplied in float32 and rounded once; otherwise both are cast to the wanted dtype first.
    """

    values: Lazy
    scales: Lazy
    block: tuple[int, int]
    is_wide: bool = True

    def __post_init__(self) -> None:
        """Raises SpecError where the scales are not those of the values."""
        n_out, n_in = self.values.shape
        n_blocks = (-(-n_out // self.block[0]), -(-n_in // self.block[1]))
        is_one = self.scales.spec.numel == 1 and n_blocks == (1, 1)
        if not is_one and self.scales.shape != n_blocks:
            raise SpecError(
                f"{self.values.spec} in blocks of {self.block[0]} x {self.block[1]} needs scales "
                f"[{n_blocks[0]}, {n_blocks[1]}]; found {self.scales.spec}",
                hint=REMEDY,
            )
        if not self.scales.dtype.is_float and self.scales.dtype not in _EXPONENTS:
            raise SpecError(f"scales of float8 are {self.scales.spec}; expected floats", hint=REMEDY)

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """The float weight [out, in]; bfloat16 where no dtype is given, and the scales are narrower."""
        own = self.scales.dtype if self.scales.dtype.is_float and self.scales.dtype.bits >= 16 else DType.BF16
        result = dtype or own
        arithmetic = DType.F32 if self.is_wide else result
        (n_out, n_in), (n_rows, n_columns) = self.values.shape, self.block
        spread = TensorSpec(DType.F32, (n_out, -(-n_in // n_columns)))

        def rows(scales: torch.Tensor) -> torch.Tensor:
            floats = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
            return floats.view(-1, spread.shape[1]).repeat_interleave(n_rows, 0)[:n_out]

        def fn(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            by_column = scales.to(arithmetic.torch).repeat_interleave(n_columns, 1)[:, :n_in]
            return values.to(arithmetic.torch).mul_(by_column).to(result.torch)

        # The scales are few: those of all rows are made at once, and cut.
        of_rows = sliceable(Apply("scales of rows", [self.scales], spread, rows, row_step=None).output())
        node = Decoded("dequantize", [self.values, of_rows], TensorSpec(result, (n_out, n_in)), fn, scratch=2.0)
        node.source = "float8"
        return node.output()


def scaled_floats(values: Lazy, scales: Lazy, block: tuple[int, int]) -> QuantizedMatrix | ScaledFloats:
    """A weight in float8 as compressed-tensors restores it: a matrix on a grid, where rows have scales of their own.

    Args:
        values, scales, block: as of `ScaledFloats`.

    Raises:
        SpecError: the scales are not those of the values.
    """
    matrix, (n_out, n_in) = ScaledFloats(values, scales, block, is_wide=False), (values.shape[0], values.shape[1])
    grid = Grid(FP8.bits, block[1] if block[1] < n_in else None, points=FP8)
    is_by_row = block[0] == 1 and scales.shape == (n_out, grid.n_groups(n_in)) and scales.dtype.bits >= 16
    if not is_by_row or values.dtype is not FP8.dtype:
        return matrix
    return QuantizedMatrix(grid, (n_out, n_in), view_as(values, DType.U8, values.shape), scales)


def block_of(weights: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that share a scale, as compressed-tensors says it of weights [out, in].

    Args:
        weights: the `weights` of a config group.

    Raises:
        RequirementError: another strategy, floats of other than 8 bits.
        SpecError: it is malformed.
    """
    strategy, bits = weights.get("strategy"), weights.get("num_bits")
    if bits != 8 or len(shape) != 2:
        raise RequirementError(f"floats of {str(bits)[:20]} bits are not read; expected 8", hint=REMEDY)
    n_out, n_in = shape
    blocks = {
        "tensor": [n_out, n_in], "channel": [1, n_in], "group": [1, weights.get("group_size")],
        "block": weights.get("block_structure"),
    }  # fmt: skip
    if not isinstance(strategy, str) or strategy not in blocks:
        raise RequirementError(
            f"float8 of strategy {str(strategy)[:40]!r} is not read; expected {', '.join(blocks)}", hint=REMEDY
        )
    block = blocks[strategy]
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise SpecError(
            f"float8, strategy {strategy!r}, in blocks of {str(block)[:60]}; expected two sizes", hint=REMEDY
        )
    return block[0], block[1]
