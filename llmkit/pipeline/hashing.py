"""Hashes of what passes by: of the tensors written, and of the input tensors they were made from."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from typing import Any

from xxhash import xxh3_128

from llmkit.tensors.lazy import Read, Rows

__all__ = ["Hasher", "ReadHash", "hash_of", "observe_read"]


@dataclass
class ReadHash:
    """The hash of an input tensor, as its rows pass by in order; given up when they do not."""

    node: Read
    hasher: Any = field(default_factory=xxh3_128)
    next_row: int = 0

    @property
    def digest(self) -> str | None:
        """The hash of the whole tensor; None when not all of it passed by in order."""
        return self.hasher.hexdigest() if self.next_row == self.node.n_rows else None


def observe_read(reads: dict[int, ReadHash], node: Read, rows: Rows, data: bytes | memoryview) -> None:
    """Rows of an input were read: hash them if they follow the rows seen before."""
    state = reads.setdefault(id(node), ReadHash(node))
    if rows[0] == state.next_row and (rows[1] > rows[0] or not node.n_rows):
        state.hasher.update(data)
        state.next_row = rows[1]


class Hasher:
    """The hash of bytes that pass by, and their CRC-32 where the file's format wants it."""

    def __init__(self, with_crc: bool) -> None:
        self._xxh3 = xxh3_128()
        self.crc: int | None = 0 if with_crc else None

    def update(self, data: bytes | memoryview) -> None:
        """More bytes."""
        self._xxh3.update(data)
        if self.crc is not None:
            self.crc = zlib.crc32(data, self.crc)

    def hexdigest(self) -> str:
        """XXH3 of all bytes so far."""
        return self._xxh3.hexdigest()


def hash_of(fd: int, position: int, nbytes: int, with_crc: bool = False) -> Hasher | None:
    """The hash of a stretch of a file; None where the file ends too early."""
    hasher = Hasher(with_crc)
    buffer = memoryview(bytearray(min(nbytes, 2**20)))
    while nbytes:
        n = os.preadv(fd, [buffer[: min(nbytes, len(buffer))]], position)
        if n == 0:
            return None
        hasher.update(buffer[:n])
        position, nbytes = position + n, nbytes - n
    return hasher
