"""The element types of GGUF files: codes, block sizes, and what becomes of them.

The table stands here, besides in the gguf library, because headers are read and checked without importing numpy; a
test holds the two together. Source: ggml.h and ggml-common.h of ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from llmkit.tensors.spec import DType


@dataclass(frozen=True, slots=True)
class GgufType:
    """An element type.

    Attributes:
        name: as ggml spells it (`Q4_K`).
        code: its number in files.
        block: elements of a block.
        nbytes: bytes of a block.
        dtype: the plain dtype it is; None for blocks.
        is_known: its blocks can be dequantized.
    """

    name: str
    code: int
    block: int
    nbytes: int
    dtype: DType | None = None
    is_known: bool = True

    def row_nbytes(self, n: int) -> int:
        """Bytes of a row of `n` elements, which `block` divides."""
        return n // self.block * self.nbytes

    def tensor_nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor."""
        return prod(shape[:-1]) * self.row_nbytes(shape[-1] if shape else 1)


_PLAIN = (
    GgufType("F32", 0, 1, 4, DType.F32), GgufType("F16", 1, 1, 2, DType.F16),
    GgufType("BF16", 30, 1, 2, DType.BF16), GgufType("F64", 28, 1, 8, DType.F64),
    GgufType("I8", 24, 1, 1, DType.I8), GgufType("I16", 25, 1, 2, DType.I16),
    GgufType("I32", 26, 1, 4, DType.I32), GgufType("I64", 27, 1, 8, DType.I64),
)  # fmt: skip
_BLOCKS = (
    GgufType("Q4_0", 2, 32, 18), GgufType("Q4_1", 3, 32, 20),
    GgufType("Q5_0", 6, 32, 22), GgufType("Q5_1", 7, 32, 24),
    GgufType("Q8_0", 8, 32, 34), GgufType("Q8_1", 9, 32, 40, is_known=False),
    GgufType("Q2_K", 10, 256, 84), GgufType("Q3_K", 11, 256, 110), GgufType("Q4_K", 12, 256, 144),
    GgufType("Q5_K", 13, 256, 176), GgufType("Q6_K", 14, 256, 210), GgufType("Q8_K", 15, 256, 292, is_known=False),
    GgufType("IQ2_XXS", 16, 256, 66), GgufType("IQ2_XS", 17, 256, 74), GgufType("IQ3_XXS", 18, 256, 98),
    GgufType("IQ1_S", 19, 256, 50), GgufType("IQ4_NL", 20, 32, 18), GgufType("IQ3_S", 21, 256, 110),
    GgufType("IQ2_S", 22, 256, 82), GgufType("IQ4_XS", 23, 256, 136), GgufType("IQ1_M", 29, 256, 56),
    GgufType("TQ1_0", 34, 256, 54), GgufType("TQ2_0", 35, 256, 66), GgufType("MXFP4", 39, 32, 17),
    GgufType("NVFP4", 40, 64, 36), GgufType("Q1_0", 41, 128, 18), GgufType("Q2_0", 42, 64, 18),
)  # fmt: skip
TYPES = {t.code: t for t in (*_PLAIN, *_BLOCKS)}
TYPE_BY_NAME = {t.name: t for t in TYPES.values()}
