"""Matrices of 4 or 8 bits as ONNX Runtime's MatMulNBits and GatherBlockQuantized take them.

    weight_codes    uint8 [N, blocks, block * bits / 8]   0 … 2^bits - 1 along K, of two in a byte the first lowest
    weight_scales   [N, blocks]                           of the compute dtype (or cast to it when a session starts)
    weight_zeros    uint8 [N, ceil(blocks * bits / 8)]    packed like the codes; absent: 2^(bits-1)
    weight_offsets  float32 [N, blocks]                   see below
    w = (code - zero) * scale; the last block of a row is filled up

A grid with an offset that is no multiple of its scale is that, and a matrix of offsets from the middle code beside it:
the product with the sums of blocks of x is added (zero points in floats would do it, too, but the CPU restores the
matrix in each call then: 16 times the time of float32 at one token). Blocks have 16, 32, 64, 128 or 256 columns.

Source: ContribOperators.md of onnxruntime, and what its CPU kernels accept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import Codec
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import n_bytes, pack, unpack, width
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import take_columns, view_as
from llmkit.tensors.spec import DType, TensorSpec


class NBits(Codec):
    """The integers of an ONNX graph."""

    name = "onnx"
    bits = (4, 8)
    group_sizes = (16, 32, 64, 128, 256)
    holds_offsets = True
    fills_rows = True
    written_by = "llmkit export MODEL --bits 4 -o OUT; without --bits a quantized model keeps its codes"

    def in_blocks(self, matrix: QuantizedMatrix) -> QuantizedMatrix | None:
        """The same weights on a grid of blocks; None where there is none.

        Larger groups become several blocks with the same scale, points that are small integers become codes of 8 bits.
        Codes of other bits stay what they are, and take 4 or 8 when they are written.
        """
        group, (n, k) = matrix.group, matrix.shape
        is_by_row = group >= k
        if matrix.order is not None or (not is_by_row and group % self.group_sizes[0]):
            return None
        plain = _of_integers(matrix) if matrix.grid.points is not None else matrix
        if plain is None:
            return None
        if plain.zeros is not None and plain.zeros.dtype is not DType.U8:
            plain = replace(plain, zeros=None, offsets=_offsets(plain.zeros, plain.scales))
        block = _block_of_row(group)
        n_blocks = -(-k // block)
        times = n_blocks if is_by_row else group // block

        def repeated(part: Lazy | None) -> Lazy | None:
            if part is None or part.shape == (n, n_blocks):
                return part

            def fn(x: torch.Tensor) -> torch.Tensor:
                return x.repeat_interleave(times, 1)[:, :n_blocks].contiguous()

            return Apply("repeat", [part], TensorSpec(part.dtype, (n, n_blocks)), fn, {"times": times}).output()

        scales, zeros, offsets = repeated(plain.scales), repeated(plain.zeros), repeated(plain.offsets)
        grid = replace(plain.grid, group_size=block)
        return replace(plain, grid=grid, scales=scales or plain.scales, zeros=zeros, offsets=offsets)

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        return None if self.in_blocks(matrix) is not None else f"{self.name} has no blocks for {matrix}"

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        """The parts of a matrix that is `in_blocks`."""
        n, bits, n_blocks = matrix.shape[0], width(matrix.bits), matrix.n_groups
        parts = {"weight_codes": _blocks(matrix), "weight_scales": matrix.scales}
        if matrix.zeros is not None:
            spec = TensorSpec(DType.U8, (n, n_bytes(n_blocks, bits)))
            parts["weight_zeros"] = Apply(
                "pack", [matrix.zeros], spec, lambda z: pack(z, bits), {"bits": bits}
            ).output()
        if matrix.offsets is not None:
            middle, spec = matrix.grid.middle, TensorSpec(DType.F32, matrix.offsets.shape)  # see _blocks

            def fn(offsets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
                return offsets.float() + middle * scales.float()

            parts["weight_offsets"] = Apply(
                "offset", [matrix.offsets, matrix.scales], spec, fn, {"steps": middle}
            ).output()
        return parts

    def settings(self, matrix: QuantizedMatrix) -> dict[str, Any]:
        """The attributes of MatMulNBits."""
        n, k = matrix.shape
        return {"K": k, "N": n, "bits": width(matrix.bits), "block_size": matrix.group}

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        """The matrix of parts and the attributes of MatMulNBits: bits, block_size, N, K."""
        bits, block, n, k = (settings[key] for key in ("bits", "block_size", "N", "K"))
        codes, scales, zeros = parts["weight_codes"], parts["weight_scales"], parts.get("weight_zeros")
        n_blocks = -(-k // block)
        if codes.spec != TensorSpec(DType.U8, (n, n_blocks, block * bits // 8)) or scales.shape != (n, n_blocks):
            raise SpecError(f"codes are {codes.spec}, scales {scales.spec}: no {n} × {k} in blocks of {block}")
        codes = take_columns(view_as(codes, DType.U8, (n, n_blocks * block * bits // 8)), 0, n_bytes(k, bits))
        if zeros is not None:
            spec = TensorSpec(DType.U8, (n, n_blocks))
            zeros = Apply("unpack", [zeros], spec, lambda z: unpack(z, bits, n_blocks), {"bits": bits}).output()
        offsets = parts.get("weight_offsets")
        if offsets is not None:
            middle, spec = 1 << (bits - 1), TensorSpec(DType.F32, offsets.shape)

            def fn(offsets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
                return offsets.sub(scales.float(), alpha=middle)

            offsets = Apply("offset", [offsets, scales], spec, fn, {"steps": -middle}).output()
        grid = Grid(bits, block, zeros is None and offsets is None)
        return QuantizedMatrix(grid, (n, k), codes, scales, zeros, offsets)


def _of_integers(matrix: QuantizedMatrix) -> QuantizedMatrix | None:
    """The same weights with integers for codes, where these stand for integers of 8 bits only."""
    values, bits, (n, k) = matrix.grid.points.values if matrix.grid.points else (), matrix.bits, matrix.shape
    if not all(x.is_integer() and -128 <= x <= 127 for x in values):
        return None

    def fn(codes: torch.Tensor) -> torch.Tensor:
        numbers = torch.tensor([int(x) + 128 for x in values], dtype=torch.uint8)
        by_code: torch.Tensor = numbers[unpack(codes, bits, k).int()]
        return by_code

    codes = Apply("look up", [matrix.codes], TensorSpec(DType.U8, (n, k)), fn, {"values": list(values)}, scratch=2.0)
    return replace(matrix, grid=replace(matrix.grid, bits=8, points=None), codes=codes.output())


def _offsets(zeros: Lazy, scales: Lazy) -> Lazy:
    """What stands for zero points between two codes, float32 [out, groups]: exact where both are half-precision."""

    def fn(zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return zeros.float().mul_(scales.float()).neg_()

    return Apply("offset", [zeros, scales], TensorSpec(DType.F32, scales.shape), fn).output()


def _block_of_row(columns: int) -> int:
    """The block for columns that share a scale: the largest that divides them, else a small one to be filled up."""
    return max([b for b in NBits.group_sizes if columns % b == 0], default=32)


def _blocks(matrix: QuantizedMatrix) -> Lazy:
    """Codes of 4 or 8 bits in blocks: those that are there, where nothing has to change.

    Without zero points the middle of a smaller range comes to lie on that of the larger one, which kernels take for
    zero. What the last block of a row lacks has that code, too.
    """
    (n, k), bits, n_codes = matrix.shape, width(matrix.bits), matrix.n_groups * matrix.group
    spec = TensorSpec(DType.U8, (n, matrix.n_groups, matrix.group * bits // 8))
    middle = 1 << (bits - 1)
    steps = middle - matrix.grid.middle if matrix.zeros is None else 0
    if n_codes == k and not steps:
        return view_as(matrix.codes, DType.U8, spec.shape)

    def fn(codes: torch.Tensor) -> torch.Tensor:
        q = torch.nn.functional.pad(unpack(codes, bits, k) + steps, (0, n_codes - k), value=middle)
        return pack(q, bits).view(len(codes), *spec.shape[1:])

    attrs = {"block": matrix.group, "steps": steps}
    return Apply("blocks", [matrix.codes], spec, fn, attrs, scratch=2.0).output()


CODEC = NBits()
