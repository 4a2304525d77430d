"""Tensors in memory as lazy ones, and one weight through a method and a codec."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from llmkit.quantization.codecs.compressed_tensors import CODEC
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.method import Observe, QuantizedRows, Task, quantized
from llmkit.quantization.methods.rtn import METHOD
from llmkit.quantization.packing import n_bytes
from llmkit.tensors.lazy import Apply, Context, Lazy
from llmkit.tensors.siblings import siblings
from llmkit.tensors.spec import DType, TensorSpec

LIBRARY_HAS_GAPS = pack_to_int32(torch.zeros((1, 32), dtype=torch.int8), 3).shape[1] != 3
"""compressed-tensors before 0.18 packs ten codes of 3 bits in a word; later ones, and llmkit, leave no gaps."""


def held(data: torch.Tensor) -> Lazy:
    """A tensor in memory, sliceable by rows."""
    spec = TensorSpec(DType.of(data.dtype), tuple(data.shape))
    counted = Apply("count", [], TensorSpec(DType.I64, (len(data),)), lambda: torch.arange(len(data)), output_rows=[1])
    counted.evaluate = lambda rows, context: (torch.arange(*rows),)
    return Apply("held", [counted.output()], spec, lambda rows: data[rows]).output()


def compressed(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, observe: Observe | None = None
) -> dict[str, torch.Tensor]:
    """A weight rounded to nearest, as compressed-tensors stores it."""
    matrix = quantized(Task(held(weight), METHOD, grid, DType.of(scale_dtype), observe=observe))
    parts, context = siblings(CODEC.write(matrix)), Context()
    return {end: context.rows(part, (0, part.node.n_rows)) for end, part in parts.items()}


def restored(rows: QuantizedRows, grid: Grid, shape: tuple[int, int]) -> torch.Tensor:
    """The floats that a method's codes stand for."""
    zeros = None if rows.zeros is None else held(rows.zeros)
    return QuantizedMatrix(grid, shape, held(rows.codes), held(rows.scales), zeros).dequantized().load()


def zeros_on(grid: Grid, **parts: Lazy) -> QuantizedMatrix:
    """A matrix of two rows, to speak of its grid."""
    size = grid.group_size or 32
    zero_points = None if grid.is_symmetric else held(torch.zeros((2, 1), dtype=torch.uint8))
    codes = held(torch.zeros((2, n_bytes(size, grid.bits)), dtype=torch.uint8))
    return QuantizedMatrix(grid, (2, size), codes, held(torch.ones(2, 1)), zero_points, **parts)


def entry_of(*grids: Grid) -> dict[str, Any]:
    """The quantization_config of linear layers on these grids."""
    return CODEC.describe({f"m{i}": zeros_on(grid) for i, grid in enumerate(grids)}, [], are_all=True)


def library_weights(grid: Grid) -> dict[str, Any]:
    """The `weights` entry of a config group."""
    return CODEC.settings(zeros_on(grid))["weights"]
