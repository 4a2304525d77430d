"""Casts of short vectors between float dtypes without torch, to torch's bits; None where torch itself must decide."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping

from llmkit.tensors.spec import DType

__all__ = ["CASTS"]


def _by_struct(source: str, target: str) -> Callable[[memoryview], bytes | None]:
    """Through Python's floats, which hold every value of both; struct rounds to the nearest, ties to even."""

    def cast(data: memoryview) -> bytes | None:
        n = len(data) // struct.calcsize(source)
        values = struct.unpack(f"<{n}{source}", data)
        if any(x != x for x in values):
            return None
        try:
            return struct.pack(f"<{n}{target}", *values)
        except OverflowError:
            return None

    return cast


def _widened(data: memoryview) -> bytes | None:
    """bfloat16 is the upper half of float32."""
    halves = array("H", bytes(data))
    return None if any(x & 0x7FFF > 0x7F80 for x in halves) else array("I", [x << 16 for x in halves]).tobytes()


def _narrowed(data: memoryview) -> bytes | None:
    words = array("I", bytes(data))
    if any(x & 0x7FFFFFFF > 0x7F800000 for x in words):
        return None
    return array("H", [(x + 0x7FFF + (x >> 16 & 1)) >> 16 for x in words]).tobytes()


CASTS: Mapping[tuple[DType, DType], Callable[[memoryview], bytes | None]] = {
    (DType.F16, DType.F32): _by_struct("e", "f"),
    (DType.F32, DType.F16): _by_struct("f", "e"),
    (DType.BF16, DType.F32): _widened,
    (DType.F32, DType.BF16): _narrowed,
}
