"""What a method is: from a weight, and what was measured of its inputs, to rows of a matrix on a grid.

A method is one module with an entry point in the group `llmkit.methods`. It knows no names and no files: which layers
are quantized is decided in `llmkit.transforms.layers`, how the result is stored by a codec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmkit import entry_points
from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import n_bytes
from llmkit.quantization.statistics import Statistics, StatisticsOf
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["GROUP", "Method", "Observe", "QuantizedRows", "Specs", "method_named", "part_specs", "quantized"]

GROUP = "llmkit.methods"
# Receives (squared error, squared norm, rows) of what was just quantized.
Observe = Callable[[float, float, int], None]
Specs = dict[str, tuple[TensorSpec, int]]


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows of a `QuantizedMatrix`, and how far they are from the weights.

    Attributes:
        codes: uint8 [rows, n_bytes(in)], as of `llmkit.quantization.packing`.
        scales: [rows, groups], in the dtype that was asked for, never 0.
        zeros: uint8 [rows, groups]; None where the grid is symmetric.
        order: int32 [in], the group of each column, from a method that `gives_order`.
        squared_error: the sum over (w - w')^2, w' as it will be read.
        squared_norm: the sum over w^2.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    squared_error: float
    squared_norm: float
    order: torch.Tensor | None = None


class Method(ABC):
    """A way to put a weight on a grid.

    Attributes:
        name: as `--method` spells it.
        words: what it does, for the plan (`rounded to nearest`).
        needs: which fields of `Statistics` it cannot do without.
        is_row_wise: rows may be quantized in slices; each is computed from itself and the statistics alone.
        gives_order: groups are not of neighbouring columns; there is an `order`, and `is_row_wise` is False.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    is_row_wise: ClassVar[bool] = True
    gives_order: ClassVar[bool] = False

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None = None
    ) -> QuantizedRows:
        """Rows of a weight [rows, in], float32, float16 or bfloat16, on `grid`.

        The last group may have fewer columns than the others.

        Raises:
            InputError: the weights hold NaN or infinities, or reach beyond the dtype of the scales.
        """


def method_named(name: str) -> Method:
    """The method that `--method NAME` means.

    Raises:
        InputError: there is none of that name.
    """
    return entry_points.by_name(GROUP, name, "--method", Method)  # type: ignore[type-abstract]


def part_specs(shape: tuple[int, ...], method: Method, grid: Grid, scale_dtype: DType) -> Specs:
    """The parts of a quantized matrix [out, in]: name -> spec, and rows of the weight for one of its own (0: whole)."""
    n_out, n_in = shape
    n_groups = grid.n_groups(n_in)
    parts = {
        "codes": (TensorSpec(DType.U8, (n_out, n_bytes(n_in, grid.bits))), 1),
        "scales": (TensorSpec(scale_dtype, (n_out, n_groups)), 1),
    }
    if not grid.is_symmetric:
        parts["zeros"] = (TensorSpec(DType.U8, (n_out, n_groups)), 1)
    if method.gives_order:
        parts["order"] = (TensorSpec(DType.I32, (n_in,)), 0)
    return parts


def quantized(
    weight: Lazy,
    method: Method,
    grid: Grid,
    scale_dtype: DType,
    *,
    name: str = "",
    statistics: StatisticsOf | None = None,
    observe: Observe | None = None,
) -> QuantizedMatrix:
    """A float matrix [out, in] as it is on the grid; computed when its parts are.

    Args:
        scale_dtype: of the scales.
        name: of the weight, for messages and statistics.
        statistics: asked when the matrix is computed.
        observe: told of the error of each slice.
    """
    parts = part_specs(weight.shape, method, grid, scale_dtype)

    def fn(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            measured = statistics(name) if statistics is not None else None
            made = method.quantize(rows, grid, scale_dtype.torch, measured)
        except InputError as error:
            raise InputError(f"{name}: {error.message}" if name else error.message, hint=error.hint) from error
        if observe is not None:
            observe(made.squared_error, made.squared_norm, len(rows))
        return tuple(getattr(made, part) for part in parts)

    node = Apply(
        "quantize",
        [weight],
        [spec for spec, _ in parts.values()],
        fn,
        {"method": method.name, **grid.attrs()},
        row_step=1 if method.is_row_wise else None,
        output_rows=[per for _, per in parts.values()],
        scratch=1.0,
    )
    made = dict(zip(parts, node.outputs(), strict=True))
    return QuantizedMatrix(
        grid, weight.shape, made["codes"], made["scales"], made.get("zeros"), order=made.get("order")
    )
