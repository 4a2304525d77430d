"""What a method is: from a weight, and what was measured of its inputs, to rows of a matrix on a grid.

A method is one module with an entry point in the group `llmkit.methods`. It knows no names and no files: which layers
are quantized is decided in `llmkit.transforms.layers`, how the result is stored by a codec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llmkit import entry_points
from llmkit.errors import InputError, RequirementError
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import n_bytes
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "GROUP",
    "Method",
    "Observe",
    "QuantizedRows",
    "Quantizer",
    "Specs",
    "method_named",
    "part_specs",
    "quantized",
]

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


class Quantizer(Protocol):
    """Makes a quantized matrix of a weight: `quantized`, or one that knows the inputs of each weight."""

    def __call__(
        self,
        weight: Lazy,
        method: Method,
        grid: Grid,
        scale_dtype: DType,
        *,
        name: str = "",
        observe: Observe | None = None,
    ) -> QuantizedMatrix:
        """As of `quantized`."""

    def attrs(self) -> Mapping[str, Any]:
        """What it knows the inputs from, as plain data for the history."""


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


def method_named(name: str, *, is_calibrated: bool = False) -> Method:
    """The method that `--method NAME` means.

    Args:
        is_calibrated: the inputs of layers are measured.

    Raises:
        InputError: there is none of that name.
        RequirementError: it needs to know the inputs of layers, and they are not measured.
    """
    found = entry_points.by_name(GROUP, name, "--method", Method)  # type: ignore[type-abstract]
    if found.needs and not is_calibrated:
        raise RequirementError(
            f"--method {name} needs {' and '.join(sorted(found.needs)).replace('_', ' ')} of the inputs of each layer",
            hint=f"llmkit quantize MODEL --bits 4 --method {name} --calibration FILE -o OUT measures them",
        )
    return found


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


def matrix_from(parts: Mapping[str, Lazy], grid: Grid, shape: tuple[int, ...]) -> QuantizedMatrix:
    """The matrix [out, in] of the parts that `part_specs` names."""
    n_out, n_in = shape
    zeros, order = parts.get("zeros"), parts.get("order")
    return QuantizedMatrix(grid, (n_out, n_in), parts["codes"], parts["scales"], zeros, order=order)


def quantized(
    weight: Lazy,
    method: Method,
    grid: Grid,
    scale_dtype: DType,
    *,
    name: str = "",
    observe: Observe | None = None,
) -> QuantizedMatrix:
    """A float matrix [out, in] as it is on the grid; computed when its parts are.

    Args:
        scale_dtype: of the scales.
        name: of the weight, for messages.
        observe: told of the error of each slice.
    """
    parts = part_specs(weight.shape, method, grid, scale_dtype)

    def fn(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            made = method.quantize(rows, grid, scale_dtype.torch)
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
    return matrix_from(made, grid, weight.shape)
