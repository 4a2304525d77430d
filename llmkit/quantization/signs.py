"""Negative scales: some layouts have them in symmetric grids, kernels of others read them as something else.

What a negative scale s stands for is exact with a positive one, where there are zero points: code q around the middle m
with s is code 2^bits - 1 - q around m - 1 with -s.
"""

from __future__ import annotations

from dataclasses import replace

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.quantization.packing import pack, unpack
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec


def with_positive_scales(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same weights with positive scales; with zero points where some may be negative (`has_signed_scales`).

    Evaluated, it raises InputError where scales are negative that were not said to be.
    """
    if not matrix.grid.is_symmetric or matrix.grid.points is not None:
        return matrix
    if not matrix.has_signed_scales:
        return replace(
            matrix, scales=Apply("positive", [matrix.scales], matrix.scales.spec, _require_positive).output()
        )
    n_in, bits, middle = matrix.shape[1], matrix.bits, matrix.grid.middle
    group, order = matrix.group, [matrix.order] if matrix.order is not None else []

    def codes(stored: torch.Tensor, scales: torch.Tensor, *order: torch.Tensor) -> torch.Tensor:
        is_negative = scales < 0
        of_column = is_negative[:, order[0].long()] if order else is_negative.repeat_interleave(group, 1)[:, :n_in]
        q = unpack(stored, bits, n_in)
        return pack(torch.where(of_column, (1 << bits) - 1 - q, q), bits)

    def zeros(scales: torch.Tensor) -> torch.Tensor:
        return (middle - (scales < 0).int()).to(DType.U8.torch)

    def part(op: str, inputs: list[Lazy], spec: TensorSpec, fn: object, **options: object) -> Lazy:
        return Apply(op, inputs, spec, fn, {"bits": bits}, **options).output()  # type: ignore[arg-type]

    scales = matrix.scales
    return replace(
        matrix,
        grid=replace(matrix.grid, is_symmetric=False),
        codes=part(
            "mirror", [matrix.codes, scales, *order], matrix.codes.spec, codes,
            input_rows=[1, 1, *(0 for _ in order)], scratch=2.0,
        ),
        scales=part("absolute", [scales], scales.spec, lambda x: x.abs()),
        zeros=part("zero points", [scales], TensorSpec(DType.U8, scales.shape), zeros),
        has_signed_scales=False,
    )  # fmt: skip


def _require_positive(scales: torch.Tensor) -> torch.Tensor:
    if bool((scales < 0).any()):
        raise InputError(
            "a symmetric grid has negative scales, which kernels read as other numbers",
            hint="llmkit convert MODEL --to dense -o FLOATS, and quantize that",
        )
    return scales
