"""Blocks of GGUF files whose points are a grid, or a table: how their bytes are codes, scales and minima.

    type                        weight              bits     columns with one scale
    Q4_0, Q5_0, Q8_0            d q                 4, 5, 8  32      q counts from the middle of its range
    Q4_1, Q5_1                  d q + m             4, 5     32
    Q3_K, Q6_K                  (d s) q             3, 6     16      q counts from the middle of its range
    Q4_K, Q5_K                  (d s) q - (e t)     4, 5     32
    Q2_K                        (d s) q - (e t)     2        16
    IQ4_NL, IQ4_XS, MXFP4       d v, (d s) v, 2^e v 4        32      v from a table of 16 integers

d, m, e are float16, s and t integers of at most 8 bits: their products are exact in float32. Source: ggml-common.h and
ggml-quants.c of ggml-org/ggml; the tests hold every type to `gguf.quants`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.tensors.spec import DType

if TYPE_CHECKING:
    import torch

    # Bytes of blocks, uint8 [rows, blocks, bytes], to numbers [rows, blocks, n].
    Unpack = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["GRIDS", "BlockGrid"]


@dataclass(frozen=True)
class BlockGrid:
    """How the blocks of a type are laid out.

    Attributes:
        bits: of a code.
        group: columns with one scale.
        codes: of all elements, uint8 [rows, blocks, block].
        scales: [rows, blocks, block / group], of `scale_dtype`.
        minima: likewise, what is added; None for types without.
        table: what codes stand for; None for the codes themselves.
    """

    bits: int
    group: int
    codes: Unpack
    scales: Unpack
    minima: Unpack | None = None
    scale_dtype: DType = DType.F32
    table: tuple[float, ...] | None = None


def _halves(x: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, [rows, blocks, 1]."""
    import torch

    return x[..., start : start + 2].contiguous().view(torch.float16)


def _half(start: int) -> Unpack:
    return lambda x: _halves(x, start)


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    """Low nibbles of all bytes, then the high ones."""
    import torch

    return torch.cat([q & 0x0F, q >> 4], -1)


def _bits(q: torch.Tensor, start: int, n: int, width: int) -> torch.Tensor:
    """Fields of `width` bits: that at bit `start` of all bytes, then the next, `n` in all; [..., n, bytes]."""
    import torch

    mask = (1 << width) - 1
    return torch.stack([(q >> (start + i * width)) & mask for i in range(n)], -2)


def _four(start: int) -> Unpack:
    return lambda x: _nibbles(x[..., start : start + 16])


def _five(start: int) -> Unpack:
    """Four bytes of fifth bits, in order; then nibbles."""

    def numbers(x: torch.Tensor) -> torch.Tensor:
        fifth = _bits(x[..., start : start + 4], 0, 8, 1).transpose(-1, -2).flatten(-2)
        return _nibbles(x[..., start + 4 : start + 20]) | (fifth << 4)

    return numbers


def _eight(x: torch.Tensor) -> torch.Tensor:
    return x[..., 2:] ^ 0x80  # signed, as 0 … 255


def _two_k(at: int) -> Unpack:
    """Two bits an element: of each 32 bytes the lowest two bits of all, then the next, for 128 elements."""

    def numbers(x: torch.Tensor) -> torch.Tensor:
        q = x[..., at : at + 64].reshape(*x.shape[:2], 2, 32)
        return _bits(q, 0, 4, 2).flatten(-3)

    return numbers


def _three_k(x: torch.Tensor) -> torch.Tensor:
    third = _bits(x[..., :32], 0, 8, 1).flatten(-2)
    return _two_k(32)(x) | (third << 2)


def _four_k(x: torch.Tensor) -> torch.Tensor:
    return _bits(x[..., -128:].reshape(*x.shape[:2], 4, 32), 0, 2, 4).flatten(-3)


def _five_k(x: torch.Tensor) -> torch.Tensor:
    return _four_k(x) | (_bits(x[..., 16:48], 0, 8, 1).flatten(-2) << 4)


def _six_k(x: torch.Tensor) -> torch.Tensor:
    low = _bits(x[..., :128].reshape(*x.shape[:2], 2, 64), 0, 2, 4)  # [..., 2 halves, 2 nibbles, 64]
    high = _bits(x[..., 128:192].reshape(*x.shape[:2], 2, 32), 0, 4, 2)  # [..., 2 halves, 4 fields, 32]
    return (low.flatten(-2) | (high.flatten(-2) << 4)).flatten(-2)


def _scales_of_12(x: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each, in twelve bytes."""
    import torch

    a, b, c = (x[..., first + i : first + i + 4] for i in (0, 4, 8))
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], -1)
    return scales, torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], -1)


def _k_scales(x: torch.Tensor) -> torch.Tensor:
    return _halves(x, 0).float() * _scales_of_12(x, 4)[0]


def _k_minima(x: torch.Tensor) -> torch.Tensor:
    return -(_halves(x, 2).float() * _scales_of_12(x, 4)[1])


def _two_k_scales(x: torch.Tensor) -> torch.Tensor:
    return _halves(x, 80).float() * (x[..., :16] & 15)


def _two_k_minima(x: torch.Tensor) -> torch.Tensor:
    return -(_halves(x, 82).float() * (x[..., :16] >> 4))


def _three_k_scales(x: torch.Tensor) -> torch.Tensor:
    low, high = _nibbles(x[..., 96:104]), _bits(x[..., 104:108], 0, 4, 2).flatten(-2)
    return _halves(x, 108).float() * ((low | (high << 4)).float() - 32)


def _six_k_scales(x: torch.Tensor) -> torch.Tensor:
    import torch

    return _halves(x, 208).float() * x[..., 192:208].contiguous().view(torch.int8)


_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of E2M1


def _by_32(start: int) -> Unpack:
    """Nibbles of 32 elements after those of the next 32."""
    return lambda x: _nibbles(x[..., start:].reshape(*x.shape[:2], -1, 16)).flatten(-2)


def _xs_scales(x: torch.Tensor) -> torch.Tensor:
    low = _bits(x[..., 4:8], 0, 2, 4).transpose(-1, -2).flatten(-2)
    high = _bits(x[..., 2:4], 0, 4, 2).transpose(-1, -2).flatten(-2)
    return _halves(x, 0).float() * ((low | (high << 4)).float() - 32)


def _fp4_scales(x: torch.Tensor) -> torch.Tensor:
    import torch

    exponents = x[..., :1].int() - 128
    return torch.ldexp(torch.ones(exponents.shape), exponents)


GRIDS = {
    "Q4_0": BlockGrid(4, 32, _four(2), _half(0), scale_dtype=DType.F16),
    "Q4_1": BlockGrid(4, 32, _four(4), _half(0), _half(2), DType.F16),
    "Q5_0": BlockGrid(5, 32, _five(2), _half(0), scale_dtype=DType.F16),
    "Q5_1": BlockGrid(5, 32, _five(4), _half(0), _half(2), DType.F16),
    "Q8_0": BlockGrid(8, 32, _eight, _half(0), scale_dtype=DType.F16),
    "Q2_K": BlockGrid(2, 16, _two_k(16), _two_k_scales, _two_k_minima),
    "Q3_K": BlockGrid(3, 16, _three_k, _three_k_scales),
    "Q4_K": BlockGrid(4, 32, _four_k, _k_scales, _k_minima),
    "Q5_K": BlockGrid(5, 32, _five_k, _k_scales, _k_minima),
    "Q6_K": BlockGrid(6, 16, _six_k, _six_k_scales),
    "IQ4_NL": BlockGrid(4, 32, _by_32(2), _half(0), scale_dtype=DType.F16, table=_NL),
    "IQ4_XS": BlockGrid(4, 32, _by_32(8), _xs_scales, table=_NL),
    "MXFP4": BlockGrid(4, 32, _by_32(1), _fp4_scales, table=_FP4),
}
