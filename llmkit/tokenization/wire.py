"""Protocol-buffer wire format: as much as a SentencePiece model needs, every other byte kept as it is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message.

    Attributes:
        number: its number.
        wire: its wire type.
        value: the integer of a varint, the bytes of everything else.
        raw: the field as it stands in the message, tag included.
    """

    number: int
    wire: int
    value: int | bytes
    raw: bytes


def read_fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        IndexError: the data ends within a field, or is no message.
    """
    position = 0
    while position < len(data):
        start = position
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == VARINT:
            value, position = _varint(data, position)
        else:
            if wire == BYTES:
                length, position = _varint(data, position)
            elif wire in (FIXED64, FIXED32):
                length = 8 if wire == FIXED64 else 4
            else:
                raise IndexError(f"wire type {wire}")
            value = data[position : position + length]
            position += length
        if position > len(data) or not number:
            raise IndexError("field beyond the end")
        yield Field(number, wire, value, data[start:position])


def encode_varint(value: int) -> bytes:
    """A non-negative integer."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_field(number: int, value: int | float | bytes) -> bytes:
    """A field: an int as a varint, a float as float32, bytes with their length."""
    if isinstance(value, bytes):
        return encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value
    if isinstance(value, float):
        return encode_varint(number << 3 | FIXED32) + struct.pack("<f", value)
    return encode_varint(number << 3 | VARINT) + encode_varint(value)


def float32_of(value: int | bytes) -> float:
    """The float of a fixed32 field."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise IndexError("not a float32")
    return float(struct.unpack("<f", value)[0])


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError("varint of more than 64 bits")
