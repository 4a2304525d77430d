"""Matrices of a graph that are computed from integers: products with them, and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmkit.lazy_imports import torch
from llmkit.onnx.graph import CONTRIB, Value
from llmkit.quantization.codecs.nbits import CODEC
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.quantization.packing import pack, unpack, width
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import transpose, view_as
from llmkit.tensors.siblings import siblings
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    from llmkit.onnx.weights import GraphWeights


@dataclass(frozen=True, eq=False)
class IntegerMatrix:
    """One matrix as the graph has it.

    Attributes:
        matrix: on a grid of blocks (`NBits.fitted`).
        is_table: it is looked up, and its codes are [N, bytes] without blocks, as GatherBlockQuantized takes them.
    """

    matrix: QuantizedMatrix
    is_table: bool = False

    @property
    def bits(self) -> int:
        """Bits that a code takes: 4 or 8."""
        return width(self.matrix.bits)

    @cached_property
    def parts(self) -> dict[str, Lazy]:
        """The initializers, by the last component of their names."""
        parts = CODEC.write(self.matrix)
        if self.is_table:
            codes = parts["weight_codes"]
            parts["weight_codes"] = view_as(codes, DType.U8, (codes.shape[0], codes.spec.row_nbytes))
        return siblings(parts)

    @cached_property
    def columns(self) -> dict[str, Lazy] | None:
        """The parts as DequantizeLinear takes them before a MatMul: [K, N], blocks along K; whole at a time.

        Codes are signed, and zero is zero, where there are no zero points. None where rows end within a block, or two
        integers would share a byte of two columns.
        """
        (n, k), bits, n_blocks = self.matrix.shape, self.bits, self.matrix.n_groups
        if k % self.matrix.group or n * bits % 8 or self.is_table or self.matrix.offsets is not None:
            return None
        is_signed = self.matrix.zeros is None

        def transposed(lazy: Lazy, rows: int) -> Lazy:
            def fn(x: torch.Tensor) -> torch.Tensor:
                stored = pack(unpack(x.flatten(1), bits, rows).t().contiguous(), bits)
                # Two's complement has the highest bit the other way round than an offset of half the range.
                return stored ^ (0x80 if bits == 8 else 0x88) if is_signed else stored

            spec, attrs = TensorSpec(DType.U8, (rows, n * bits // 8)), {"bits": bits, "signed": is_signed}
            return Apply("transpose codes", [lazy], spec, fn, attrs, row_step=None).output()

        parts = CODEC.write(self.matrix)
        parts["weight_codes"] = transposed(parts["weight_codes"], k)
        parts["weight_scales"] = transpose(parts["weight_scales"])
        if not is_signed:
            parts["weight_zeros"] = transposed(parts["weight_zeros"], n_blocks)
        return siblings(parts)


@dataclass(frozen=True)
class IntegerMatrices:
    """The matrices of a graph that are computed from integers, and how.

    Attributes:
        matrices: by the name of the tensor that they stand for.
        accuracy_level: what MatMulNBits computes in: 0 the dtype of its input, 1 float32, 4 int8.
        is_qdq: DequantizeLinear and MatMul in place of MatMulNBits, where a matrix has that form.
    """

    matrices: Mapping[str, IntegerMatrix] = field(default_factory=dict)
    accuracy_level: int = 0
    is_qdq: bool = False

    def product(self, weights: GraphWeights, x: Value, name: str, bias: Value | None) -> Any:
        """X [B, S, K] with the matrix that stands for tensor `name`, plus a bias [N]: [B, S, N]."""
        integers, g = self.matrices[name], weights.graph
        matrix = integers.matrix
        if self.is_qdq and integers.columns is not None:
            y = g.op("MatMul", x, _dequantized(weights, name, integers, integers.columns))
            return y if bias is None else g.op("Add", y, bias)
        codes, scales, zeros, offsets = _values(weights, name, integers)
        if integers.is_table:  # one copy of the bytes for the table and the head
            codes = g.op("Reshape", codes, g.ints(matrix.shape[0], matrix.n_groups, -1))
        inputs = [x, codes, scales, zeros, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        y = g.op(
            "MatMulNBits", *inputs,
            domain=CONTRIB,
            **CODEC.settings(matrix),
            accuracy_level=self.accuracy_level,
        )  # fmt: skip
        if offsets is None:
            return y
        sums = weights.block_sums(x, matrix.group, matrix.n_groups)
        return g.op("Add", y, g.op("FusedMatMul", sums, offsets, domain=CONTRIB, transB=1))

    def rows(self, weights: GraphWeights, name: str, at: Value) -> Any:
        """Rows of the table that stands for tensor `name`, in the compute dtype."""
        integers, g = self.matrices[name], weights.graph
        matrix = integers.matrix
        codes, scales, zeros, offsets = _values(weights, name, integers)
        rows = g.op(
            "GatherBlockQuantized", codes, at, scales, *([zeros] if zeros is not None else []),
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            bits=integers.bits,
            block_size=matrix.group,
        )  # fmt: skip
        if offsets is None:
            return rows
        blocks = g.op("Reshape", rows, g.ints(0, 0, matrix.n_groups, matrix.group))
        added = g.op("Unsqueeze", g.op("Gather", offsets, at), g.ints(-1))
        return g.op("Reshape", g.op("Add", blocks, added), g.ints(0, 0, matrix.shape[1]))


def fits_experts(matrix: QuantizedMatrix) -> bool:
    """Whether QMoE takes a matrix from `in_blocks`: 4 bits, whole blocks, no offsets."""
    return width(matrix.bits) == 4 and matrix.offsets is None and matrix.shape[1] % matrix.group == 0


def _values(
    weights: GraphWeights, name: str, integers: IntegerMatrix
) -> tuple[Value, Value, Value | None, Value | None]:
    """Codes, scales in the compute dtype, zero points, and offsets in the compute dtype."""
    stem, parts = name.removesuffix("weight"), integers.parts
    codes = weights.initializer(f"{stem}weight_codes", parts["weight_codes"])
    scales = weights.derived(f"{stem}weight_scales", parts["weight_scales"])
    end = "weight_zeros"
    zeros = weights.initializer(stem + end, parts[end]) if end in parts else None
    end = "weight_offsets"
    return codes, scales, zeros, weights.derived(stem + end, parts[end]) if end in parts else None


def _dequantized(weights: GraphWeights, name: str, integers: IntegerMatrix, columns: Mapping[str, Lazy]) -> Any:
    """The float matrix [K, N]; ONNX Runtime makes MatMulNBits of this and the product when a session starts."""
    matrix, stem = integers.matrix, name.removesuffix("weight")
    n, k = matrix.shape

    def stored(end: str, rows: int) -> Value:
        value = weights.initializer(stem + end, columns[end])
        value.dtype, value.shape = f"{'INT' if matrix.zeros is None else 'UINT'}{integers.bits}", (rows, n)
        return value

    inputs = [stored("weight_codes", k), weights.derived(f"{stem}weight_scales", columns["weight_scales"])]
    if matrix.zeros is not None:
        inputs.append(stored("weight_zeros", matrix.n_groups))
    return weights.graph.op("DequantizeLinear", *inputs, axis=0, block_size=matrix.group)
