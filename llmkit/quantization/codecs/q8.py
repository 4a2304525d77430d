"""llama2.c's int8: signed numbers in row-major order, and a float32 scale of max/127 for each group of them.

    int8   [out, in]
    scale  [out, groups]

Groups may cross rows there: such a matrix is one of rows as long as a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmkit.errors import SpecError
from llmkit.quantization.codec import Codec
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType

if TYPE_CHECKING:
    import torch

__all__ = ["CODEC", "Q8"]


class Q8(Codec):
    """Symmetric int8."""

    name = "llama2c"
    bits = (8,)
    group_sizes = (64,)
    holds_zeros = False

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        return {"int8": _offset(matrix.codes, DType.I8), "scale": matrix.scales.cast(DType.F32)}

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        values, scales = parts["int8"], parts["scale"]
        (n_out, n_in), n_groups = values.shape, scales.shape[1]
        if values.dtype is not DType.I8 or scales.shape[0] != n_out or n_in % n_groups:
            raise SpecError(f"int8 is {values.spec}, scale {scales.spec}: no groups of one size")
        return QuantizedMatrix(Grid(8, n_in // n_groups), (n_out, n_in), _offset(values, DType.U8), scales)


def _offset(lazy: Lazy, dtype: DType) -> Lazy:
    """Signed numbers as codes, or back: 128 is added, in either direction."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        import torch

        return (x.view(torch.uint8) ^ 0x80).view(dtype.torch)

    return Apply("offset", [lazy], lazy.spec.with_dtype(dtype), fn).output()


CODEC = Q8()
