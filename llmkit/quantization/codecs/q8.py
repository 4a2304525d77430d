"""llama2.c's int8: signed numbers in row-major order, and a float32 scale of max/127 for each group of them.

    int8   [out, in]
    scale  [out, groups]

Groups may cross rows there: such a matrix is one of rows as long as a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.errors import SpecError
from llmkit.quantization.codec import Codec
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.words import from_signed, to_signed
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType


class Q8(Codec):
    """Symmetric int8."""

    name = "llama2c"
    bits = (8,)
    group_sizes = (64,)
    holds_zeros = False

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        return {"int8": to_signed(matrix.codes), "scale": matrix.scales.cast(DType.F32)}

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        values, scales = parts["int8"], parts["scale"]
        (n_out, n_in), n_groups = values.shape, scales.shape[1]
        if values.dtype is not DType.I8 or scales.shape[0] != n_out or n_in % n_groups:
            raise SpecError(f"int8 is {values.spec}, scale {scales.spec}: no groups of one size")
        return QuantizedMatrix(Grid(8, n_in // n_groups), (n_out, n_in), from_signed(values, 8), scales)


CODEC = Q8()
