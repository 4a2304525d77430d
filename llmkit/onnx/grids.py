"""Matrices of a graph that are computed from integers: products with them, and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.onnx.graph import CONTRIB, Value
from llmkit.onnx.nbits import Columns, NBits, columns_of
from llmkit.tensors.lazy import Lazy

if TYPE_CHECKING:
    from llmkit.onnx.weights import GraphWeights

__all__ = ["Grids"]


@dataclass(frozen=True)
class Grids:
    """Which matrices, and how they are computed.

    Attributes:
        matrices: by the name of the tensor that they stand for.
        accuracy_level: what MatMulNBits computes in: 0 the dtype of its input, 1 float32, 4 int8.
        is_qdq: DequantizeLinear and MatMul in place of MatMulNBits, where a matrix has that form.
    """

    matrices: Mapping[str, NBits] = field(default_factory=dict)
    accuracy_level: int = 0
    is_qdq: bool = False

    def product(self, weights: GraphWeights, x: Value, name: str, bias: Value | None) -> Any:
        """X [B, S, K] with the matrix that stands for tensor `name`, plus a bias [N]: [B, S, N]."""
        matrix, g = self.matrices[name], weights.graph
        columns = columns_of(matrix) if self.is_qdq else None
        if columns is not None:
            y = g.op("MatMul", x, _dequantized(weights, name, matrix, columns))
            return y if bias is None else g.op("Add", y, bias)
        codes, scales, zeros = self._parts(weights, name)
        if matrix.is_table:  # one copy of the bytes for the table and the head
            codes = g.op("Reshape", codes, g.ints(matrix.shape[0], matrix.n_blocks, -1))
        inputs = [x, codes, scales, zeros, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        y = g.op(
            "MatMulNBits", *inputs,
            domain=CONTRIB,
            K=matrix.shape[1],
            N=matrix.shape[0],
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=self.accuracy_level,
        )  # fmt: skip
        offsets = self._offsets(weights, name)
        if offsets is None:
            return y
        sums = weights.block_sums(x, matrix.block, matrix.n_blocks)
        return g.op("Add", y, g.op("FusedMatMul", sums, offsets, domain=CONTRIB, transB=1))

    def rows(self, weights: GraphWeights, name: str, at: Value) -> Any:
        """Rows of the table that stands for tensor `name`, in the compute dtype."""
        matrix = self.matrices[name]
        codes, scales, zeros = self._parts(weights, name)
        inputs = [codes, at, scales] + ([zeros] if zeros is not None else [])
        g, offsets = weights.graph, self._offsets(weights, name)
        found = g.op(
            "GatherBlockQuantized", *inputs,
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            bits=matrix.bits,
            block_size=matrix.block,
        )  # fmt: skip
        if offsets is None:
            return found
        blocks = g.op("Reshape", found, g.ints(0, 0, matrix.n_blocks, matrix.block))
        added = g.op("Unsqueeze", g.op("Gather", offsets, at), g.ints(-1))
        return g.op("Reshape", g.op("Add", blocks, added), g.ints(0, 0, matrix.shape[1]))

    def _offsets(self, weights: GraphWeights, name: str) -> Value | None:
        lazy = self.matrices[name].from_middle()
        return weights.derived(f"{name.removesuffix('.weight')}.weight_offsets", lazy) if lazy is not None else None

    def _parts(self, weights: GraphWeights, name: str) -> tuple[Value, Value, Value | None]:
        """Codes, scales in the compute dtype, and zero points."""
        matrix, stem = self.matrices[name], name.removesuffix(".weight")
        codes = weights.initializer(f"{stem}.weight_codes", matrix.codes)
        scales = weights.derived(f"{stem}.weight_scales", matrix.scales)
        zeros = weights.initializer(f"{stem}.weight_zeros", matrix.zeros) if matrix.zeros is not None else None
        return codes, scales, zeros


def _dequantized(weights: GraphWeights, name: str, matrix: NBits, columns: Columns) -> Any:
    """The float matrix [K, N]; ONNX Runtime makes MatMulNBits of this and the product when a session starts."""
    n, k = matrix.shape
    stem, kind = name.removesuffix(".weight"), columns.kind(matrix.bits)

    def integers(what: str, lazy: Lazy, rows: int) -> Value:
        value = weights.initializer(f"{stem}.weight_{what}", lazy)
        value.dtype, value.shape = kind, (rows, n)
        return value

    inputs = [integers("codes", columns.codes, k), weights.derived(f"{stem}.weight_scales", columns.scales)]
    if columns.zeros is not None:
        inputs.append(integers("zeros", columns.zeros, matrix.n_blocks))
    return weights.graph.op("DequantizeLinear", *inputs, axis=0, block_size=matrix.block)
