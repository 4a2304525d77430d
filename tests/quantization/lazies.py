"""Tensors in memory as lazy ones, and one weight through a method and a codec."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from llmkit.quantization.codecs.compressed_tensors import CODEC
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import Observe, quantized
from llmkit.quantization.methods.rtn import METHOD
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
    matrix = quantized(held(weight), METHOD, grid, DType.of(scale_dtype), observe=observe)
    parts, context = siblings(CODEC.write(matrix)), Context()
    return {end: context.rows(part, (0, part.node.n_rows)) for end, part in parts.items()}


def library_weights(grid: Grid) -> dict[str, object]:
    """The `weights` entry of a config group."""
    entry = CODEC.describe({"m": grid}, [], are_all=True)
    return entry["config_groups"]["group_0"]["weights"]
