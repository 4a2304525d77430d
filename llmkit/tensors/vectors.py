"""Vectors of floats in another dtype, without torch.

A layout that wants norms and biases in float32 would otherwise make a conversion that only moves bytes pay for the
import of torch. Vectors are short: the standard library converts them in no time, with the same bits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from llmkit.tensors.lazy import Lazy
from llmkit.tensors.moving import MoveBytes
from llmkit.tensors.spec import DType


def cast_vector(lazy: Lazy, dtype: DType) -> Lazy:
    """A vector in another dtype: float16 or bfloat16 as float32, and back (what does not fit is rounded, or infinite).

    Anything else is cast as ever.
    """
    if lazy.dtype is dtype or len(lazy.shape) != 1 or DType.F32 not in (lazy.dtype, dtype):
        return lazy.cast(dtype)
    other = dtype if lazy.dtype is DType.F32 else lazy.dtype
    if other not in (DType.F16, DType.BF16):
        return lazy.cast(dtype)
    convert = {
        (DType.BF16, DType.F32): _widened_brain,
        (DType.F32, DType.BF16): _narrowed_brain,
        (DType.F16, DType.F32): _widened_half,
        (DType.F32, DType.F16): _narrowed_half,
    }[lazy.dtype, dtype]

    def move(pieces: Sequence[memoryview], _n_rows: int) -> tuple[bytes]:
        return (convert(bytes(pieces[0])),)

    attrs = {"to": dtype.name}
    return MoveBytes("cast", [lazy], lazy.spec.with_dtype(dtype), move, attrs).output()


def _widened_brain(data: bytes) -> bytes:
    widened = bytearray(2 * len(data))
    widened[2::4], widened[3::4] = data[0::2], data[1::2]
    return bytes(widened)


def _narrowed_brain(data: bytes) -> bytes:
    """Round to nearest, ties to even."""
    if not any(data[0::4]) and not any(data[1::4]):
        narrowed = bytearray(len(data) // 2)
        narrowed[0::2], narrowed[1::2] = data[2::4], data[3::4]
        return bytes(narrowed)
    words = struct.unpack(f"<{len(data) // 4}I", data)
    return struct.pack(f"<{len(words)}H", *map(_rounded, words))


def _rounded(word: int) -> int:
    if word & 0x7FFFFFFF > 0x7F800000:
        return 0x7FC0  # as torch writes any NaN
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16


def _widened_half(data: bytes) -> bytes:
    n = len(data) // 2
    return struct.pack(f"<{n}f", *struct.unpack(f"<{n}e", data))


def _narrowed_half(data: bytes) -> bytes:
    values = struct.unpack(f"<{len(data) // 4}f", data)
    try:
        return struct.pack(f"<{len(values)}e", *values)
    except OverflowError:
        return b"".join(map(_half, values))


def _half(value: float) -> bytes:
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", float("inf") if value > 0 else float("-inf"))
