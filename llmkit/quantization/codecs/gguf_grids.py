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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.tensors.spec import DType

if TYPE_CHECKING:
    import torch

    # Bytes of blocks, uint8 [rows, blocks, bytes], to numbers [rows, blocks, n].
    Unpack = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["GRIDS", "BlockGrid", "Plane", "pack_planes", "unpack_planes"]


@dataclass(frozen=True)
class Plane:
    """Some bits of all numbers of a block: fields of `width` bits, from the lowest of a byte on.

    The first fields of `run` bytes belong to numbers that follow each other, then the second ones, and so on; then come
    the next `run` bytes.

    Attributes:
        start, nbytes: where it is in the block.
        shift: the place of these bits in the number.
    """

    start: int
    nbytes: int
    width: int = 4
    run: int = 16
    shift: int = 0


@dataclass(frozen=True)
class BlockGrid:
    """How the blocks of a type are laid out.

    Attributes:
        bits: of a code.
        group: columns with one scale.
        codes: of all elements; of eight bits they are signed.
        scales: [rows, blocks, block / group], of `scale_dtype`.
        minima: likewise, what is added; None for types without.
        table: what codes stand for; None for the codes themselves.
    """

    bits: int
    group: int
    codes: Sequence[Plane]
    scales: Unpack
    minima: Unpack | None = None
    scale_dtype: DType = DType.F32
    table: tuple[float, ...] | None = None


def unpack_planes(x: torch.Tensor, planes: Sequence[Plane]) -> torch.Tensor:
    """The numbers, uint8 [rows, blocks, n], that planes of blocks [rows, blocks, bytes] make together."""
    import torch

    def numbers(p: Plane) -> torch.Tensor:
        stored = x[..., p.start : p.start + p.nbytes]
        if p.width == 8:
            return stored
        mask, runs = (1 << p.width) - 1, stored.reshape(*x.shape[:2], -1, p.run)
        fields = torch.stack([(runs >> place) & mask for place in range(0, 8, p.width)], -2).flatten(-3)
        return fields << p.shift if p.shift else fields

    found = numbers(planes[0])
    for plane in planes[1:]:
        found |= numbers(plane)
    return found


def pack_planes(into: torch.Tensor, numbers: torch.Tensor, planes: Sequence[Plane]) -> None:
    """Write numbers [rows, blocks, n] into blocks, of which the bits of these planes are 0."""
    import torch

    for p in planes:
        places = torch.arange(0, 8, p.width, dtype=torch.uint8).unsqueeze(-1)
        fields = ((numbers >> p.shift) & ((1 << p.width) - 1)).view(*numbers.shape[:2], -1, 8 // p.width, p.run)
        into[..., p.start : p.start + p.nbytes] |= (fields << places).sum(-2, dtype=torch.uint8).flatten(-2)


def _half(start: int) -> Unpack:
    """The float16 at a byte of each block, [rows, blocks, 1]."""

    def number(x: torch.Tensor) -> torch.Tensor:
        import torch

        return x[..., start : start + 2].contiguous().view(torch.float16)

    return number


def _times(start: int, integers: Unpack) -> Unpack:
    """The float16 at a byte of each block, times its small integers, in float32."""
    half = _half(start)
    return lambda x: half(x).float() * integers(x)


def _six_bits(first: int, *, are_minima: bool) -> Unpack:
    """Eight scales or eight minima, which are negative, of six bits each in twelve bytes."""

    def integers(x: torch.Tensor) -> torch.Tensor:
        import torch

        a, b, c = (x[..., first + i : first + i + 4] for i in (0, 4, 8))
        if are_minima:
            return -torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], -1).float()
        return torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], -1)

    return integers


def _less_32(*planes: Plane) -> Unpack:
    return lambda x: unpack_planes(x, planes).float() - 32


def _nibbles(x: torch.Tensor) -> torch.Tensor:
    return unpack_planes(x, [Plane(0, 16)]).float()


def _signed(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x[..., 192:208].contiguous().view(torch.int8)


def _power(x: torch.Tensor) -> torch.Tensor:
    import torch

    exponents = x[..., :1].int() - 128
    return torch.ldexp(torch.ones(exponents.shape), exponents)


_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of E2M1
_F16 = DType.F16

GRIDS = {
    "Q4_0": BlockGrid(4, 32, [Plane(2, 16)], _half(0), None, _F16),
    "Q4_1": BlockGrid(4, 32, [Plane(4, 16)], _half(0), _half(2), _F16),
    "Q5_0": BlockGrid(5, 32, [Plane(6, 16), Plane(2, 4, 1, 1, 4)], _half(0), None, _F16),
    "Q5_1": BlockGrid(5, 32, [Plane(8, 16), Plane(4, 4, 1, 1, 4)], _half(0), _half(2), _F16),
    "Q8_0": BlockGrid(8, 32, [Plane(2, 32, 8, 32)], _half(0), None, _F16),
    "Q2_K": BlockGrid(2, 16, [Plane(16, 64, 2, 32)], _times(80, lambda x: _nibbles(x)[..., :16]),
                      _times(82, lambda x: -_nibbles(x)[..., 16:])),
    "Q3_K": BlockGrid(3, 16, [Plane(32, 64, 2, 32), Plane(0, 32, 1, 32, 2)],
                      _times(108, _less_32(Plane(96, 8, 4, 8), Plane(104, 4, 2, 4, 4)))),
    "Q4_K": BlockGrid(4, 32, [Plane(16, 128, 4, 32)], _times(0, _six_bits(4, are_minima=False)),
                      _times(2, _six_bits(4, are_minima=True))),
    "Q5_K": BlockGrid(5, 32, [Plane(48, 128, 4, 32), Plane(16, 32, 1, 32, 4)],
                      _times(0, _six_bits(4, are_minima=False)), _times(2, _six_bits(4, are_minima=True))),
    "Q6_K": BlockGrid(6, 16, [Plane(0, 128, 4, 64), Plane(128, 64, 2, 32, 4)], _times(208, _signed)),
    "IQ4_NL": BlockGrid(4, 32, [Plane(2, 16)], _half(0), None, _F16, _NL),
    "IQ4_XS": BlockGrid(4, 32, [Plane(8, 128)], _times(0, _less_32(Plane(4, 4, 4, 1), Plane(2, 2, 2, 1, 4))),
                        table=_NL),
    "MXFP4": BlockGrid(4, 32, [Plane(1, 16)], _power, table=_FP4),
}  # fmt: skip
