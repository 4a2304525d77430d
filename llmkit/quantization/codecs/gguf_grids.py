"""Blocks of GGUF files whose points are a grid, or a table: how their bytes are codes, scales and minima, and back.

    type                        weight              bits     columns with one scale
    Q4_0, Q5_0, Q8_0            d q                 4, 5, 8  32      q counts from the middle of its range
    Q4_1, Q5_1                  d q + e             4, 5     32
    Q3_K, Q6_K                  (d s) q             3, 6     16      q counts from the middle of its range
    Q4_K, Q5_K                  (d s) q - (e t)     4, 5     32
    Q2_K                        (d s) q - (e t)     2        16
    Q1_0, Q2_0                  d v                 1, 2     128, 64 v = -1 and 1, or -1 to 2
    IQ4_NL, IQ4_XS, MXFP4       d v, (d s) v, 2^d v 4        32      v from a table of 16 integers

d and e are float16 (d of MXFP4 a byte), s and t integers of at most 8 bits: their products are exact in float32.
Source: ggml-common.h and ggml-quants.c of ggml-org/ggml; the tests hold every type to `gguf.quants`, bit for bit, and
those that it does not have to what ggml itself makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from llmkit.lazy_imports import torch
from llmkit.quantization.codecs.gguf_points import Points
from llmkit.tensors.spec import DType


class Field(Protocol):
    """Where small numbers lie in a block."""

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """The numbers, uint8 [..., n], in blocks [..., bytes]."""

    def write(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        """Put numbers [..., n] into blocks where the bits of the field are 0."""


@dataclass(frozen=True)
class Plane:
    """Some bits of all numbers of a field: parts of `width` bits, from the lowest of a byte on.

    The first parts of `run` bytes belong to numbers that follow each other, then the second ones, and so on; then come
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


class Planes:
    """A field of planes. Numbers of eight bits are signed in files; here they are counted from -128."""

    def __init__(self, *planes: Plane) -> None:
        self._planes = planes

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        numbers = self._numbers(blocks, self._planes[0])
        for plane in self._planes[1:]:
            numbers |= self._numbers(blocks, plane)
        return numbers

    @staticmethod
    def _numbers(blocks: torch.Tensor, p: Plane) -> torch.Tensor:
        stored = blocks[..., p.start : p.start + p.nbytes]
        if p.width == 8:
            return stored ^ 0x80
        mask, runs = (1 << p.width) - 1, stored.reshape(*stored.shape[:-1], -1, p.run)
        parts = torch.stack([(runs >> place) & mask for place in range(0, 8, p.width)], -2).flatten(-3)
        return parts << p.shift if p.shift else parts

    def write(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        for p in self._planes:
            into = blocks[..., p.start : p.start + p.nbytes]
            if p.width == 8:
                into |= numbers ^ 0x80
                continue
            into = into.unflatten(-1, (-1, p.run))
            mask, n_parts = (1 << p.width) - 1, 8 // p.width
            parts = ((numbers >> p.shift) & mask).unflatten(-1, (-1, n_parts, p.run))
            for i in range(n_parts):
                into |= parts[..., i, :] << (p.width * i)


class _SixBits:
    """Eight scales and eight minima of six bits each, in the twelve bytes after the two float16 numbers of a block."""

    _BYTES = slice(4, 16)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        a, b, c = blocks[..., self._BYTES].split(4, -1)
        return torch.cat([a & 63, (c & 15) | ((a >> 6) << 4), b & 63, (c >> 4) | ((b >> 6) << 4)], -1)

    def write(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        s, s_more, t, t_more = numbers.split(4, -1)
        three = [s | ((s_more >> 4) << 6), t | ((t_more >> 4) << 6), (s_more & 15) | ((t_more & 15) << 4)]
        blocks[..., self._BYTES] = torch.cat(three, -1)


@dataclass(frozen=True)
class BlockGrid:
    """How the blocks of a type are laid out.

    Attributes:
        block: weights of a block.
        nbytes: of a block.
        bits: of a code.
        group: weights with one scale.
        codes: of all weights.
        d, e: bytes where the float16 numbers are; e is None for types without minima.
        integers: s of all groups, then t of all, of `integer_bits` each; None where the one group has d (and e) alone.
        centre: what s is counted from.
        table: what codes stand for; None for the codes themselves.
        has_power: the scale is a byte, 2^(d - 128).
    """

    block: int
    nbytes: int
    bits: int
    group: int
    codes: Field
    d: int
    e: int | None = None
    integers: Field | None = None
    integer_bits: int = 0
    centre: int = 0
    table: tuple[float, ...] | None = None
    has_power: bool = False

    @property
    def scale_dtype(self) -> DType:
        """Of `scales` and `minima`."""
        return DType.F16 if self.integers is None and not self.has_power else DType.F32

    @cached_property
    def points(self) -> Points:
        """What codes stand for, before scale and minimum."""
        if self.table is not None:
            return Points(self.table[0], self.table[-1], tuple(self.table))
        half = 1 << (self.bits - 1)
        return Points(-half, half - 1) if self.e is None else Points(0, 2 * half - 1)

    @cached_property
    def scale_steps(self) -> Points | None:
        """The values of s; None for types without."""
        return Points(-self.centre, (1 << self.integer_bits) - 1 - self.centre) if self.integers else None

    @cached_property
    def minimum_steps(self) -> Points | None:
        """The values of t; None for types without."""
        return Points(0, (1 << self.integer_bits) - 1) if self.integers and self.e is not None else None

    def scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """The scales [..., groups] of blocks [..., nbytes], in `scale_dtype`."""
        if self.has_power:
            exponents = blocks[..., self.d : self.d + 1].int() - 128
            return torch.ldexp(torch.ones(exponents.shape), exponents)
        half = _half(blocks, self.d)
        if self.integers is None:
            return half
        n_groups = self.block // self.group
        return half.float() * (self.integers.read(blocks)[..., :n_groups].float() - self.centre)

    def minima(self, blocks: torch.Tensor) -> torch.Tensor:
        """What is added to the weights of each group, for types that have it; likewise."""
        half = _half(blocks, self.e or 0)
        if self.integers is None:
            return half
        return half.float() * -self.integers.read(blocks)[..., self.block // self.group :].float()

    def floats(self, blocks: torch.Tensor) -> torch.Tensor:
        """The weights, float32 [..., block], of blocks [..., nbytes] of a type with a table."""
        values = torch.tensor(self.table).float()[self.codes.read(blocks).int()]
        by_group = values.view(*values.shape[:-1], -1, self.group) * self.scales(blocks).float().unsqueeze(-1)
        return by_group.flatten(-2)

    def pack(
        self, codes: torch.Tensor, halves: Sequence[torch.Tensor], integers: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Blocks, uint8 [blocks, nbytes].

        Args:
            codes: uint8 [blocks, block]; either axis may be the inner one.
            halves: d, and e for types with minima; float16 [blocks], or uint8 where d is the byte of a power.
            integers: as stored (s + centre, then t), uint8 [blocks, n], for types that have them.
        """
        shape = len(codes), self.nbytes
        is_by_rows = codes.is_contiguous()
        blocks = torch.zeros(shape if is_by_rows else shape[::-1], dtype=torch.uint8)
        blocks = blocks if is_by_rows else blocks.T  # in memory like the codes
        self.codes.write(blocks, codes)
        for start, half in zip((self.d, self.e or 0), halves, strict=False):
            number = half.unsqueeze(-1).contiguous().view(torch.uint8)
            blocks[..., start : start + number.shape[-1]] = number
        if self.integers is not None and integers is not None:
            self.integers.write(blocks, integers)
        return blocks.contiguous()


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at a byte of each block, [..., 1]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of E2M1
_PAIRS = Plane(0, 16, 4, 16)  # s of sixteen groups in the lower halves of bytes, t in the upper ones

GRIDS = {
    "Q4_0": BlockGrid(32, 18, 4, 32, Planes(Plane(2, 16)), 0),
    "Q4_1": BlockGrid(32, 20, 4, 32, Planes(Plane(4, 16)), 0, 2),
    "Q5_0": BlockGrid(32, 22, 5, 32, Planes(Plane(6, 16), Plane(2, 4, 1, 1, 4)), 0),
    "Q5_1": BlockGrid(32, 24, 5, 32, Planes(Plane(8, 16), Plane(4, 4, 1, 1, 4)), 0, 2),
    "Q8_0": BlockGrid(32, 34, 8, 32, Planes(Plane(2, 32, 8, 32)), 0),
    "Q2_K": BlockGrid(256, 84, 2, 16, Planes(Plane(16, 64, 2, 32)), 80, 82, Planes(_PAIRS), 4),
    "Q3_K": BlockGrid(256, 110, 3, 16, Planes(Plane(32, 64, 2, 32), Plane(0, 32, 1, 32, 2)), 108, None,
                      Planes(Plane(96, 8, 4, 8), Plane(104, 4, 2, 4, 4)), 6, 32),
    "Q4_K": BlockGrid(256, 144, 4, 32, Planes(Plane(16, 128, 4, 32)), 0, 2, _SixBits(), 6),
    "Q5_K": BlockGrid(256, 176, 5, 32, Planes(Plane(48, 128, 4, 32), Plane(16, 32, 1, 32, 4)), 0, 2, _SixBits(), 6),
    "Q6_K": BlockGrid(256, 210, 6, 16, Planes(Plane(0, 128, 4, 64), Plane(128, 64, 2, 32, 4)), 208, None,
                      Planes(Plane(192, 16, 8, 16)), 8, 128),
    "IQ4_NL": BlockGrid(32, 18, 4, 32, Planes(Plane(2, 16)), 0, table=_NL),
    "IQ4_XS": BlockGrid(256, 136, 4, 32, Planes(Plane(8, 128)), 0, None,
                        Planes(Plane(4, 4, 4, 1), Plane(2, 2, 2, 1, 4)), 6, 32, table=_NL),
    "Q1_0": BlockGrid(128, 18, 1, 128, Planes(Plane(2, 16, 1, 1)), 0, table=(-1, 1)),
    "Q2_0": BlockGrid(64, 18, 2, 64, Planes(Plane(2, 16, 2, 1)), 0, table=(-1, 0, 1, 2)),
    "MXFP4": BlockGrid(32, 17, 4, 32, Planes(Plane(1, 16)), 0, table=_FP4, has_power=True),
}  # fmt: skip
