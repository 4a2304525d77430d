"""Hashes of files and parts of them, of the tensors written, and of the inputs they were made from."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128

from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.tensors.lazy import Bytes, Read, Rows
from llmkit.tensors.source import SourceFile

_CHUNK_NBYTES = 2**20


class Hash(Protocol):
    """What hashlib's and xxhash's hashers have in common."""

    def update(self, data: Bytes, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""


class Hasher:
    """The XXH3 of bytes that pass by, and their CRC-32 where the file's format wants it."""

    def __init__(self, with_crc: bool = False) -> None:
        self._xxh3 = xxh3_128()
        self.crc: int | None = 0 if with_crc else None

    def update(self, data: Bytes, /) -> None:
        """Add bytes."""
        self._xxh3.update(data)
        if self.crc is not None:
            self.crc = zlib.crc32(data, self.crc)

    def hexdigest(self) -> str:
        """XXH3 of all bytes so far."""
        return self._xxh3.hexdigest()


@dataclass
class ReadHash:
    """The hash of an input tensor, as its rows pass by in order; given up when they do not."""

    node: Read
    hasher: Hasher = field(default_factory=Hasher)
    next_row: int = 0

    @property
    def digest(self) -> str | None:
        """The hash of the whole tensor; None when not all of it passed by in order."""
        return self.hasher.hexdigest() if self.next_row == self.node.n_rows else None


def observe_read(reads: dict[int, ReadHash], node: Read, rows: Rows, data: Bytes) -> None:
    """Rows of an input were read: hash them if they follow the rows seen before."""
    state = reads.setdefault(id(node), ReadHash(node))
    if rows[0] == state.next_row and (rows[1] > rows[0] or not node.n_rows):
        state.hasher.update(data)
        state.next_row = rows[1]


def new_hasher(algorithm: str) -> Hash:
    """A hasher by name: md5, sha1, sha256 (none is used against forgery), or xxh3."""
    hasher: Any = xxh3_128() if algorithm == "xxh3" else hashlib.new(algorithm, usedforsecurity=False)
    new: Hash = hasher
    return new


def feed(
    hasher: Hash, source: SourceFile, offset: int, nbytes: int, advance: Callable[[int], None] = lambda n: None
) -> None:
    """Let a hasher see `nbytes` bytes of a file from `offset`.

    Args:
        advance: told the number of bytes of each piece that was hashed; what it raises ends the hashing.

    Raises:
        InputError: the file cannot be read, or ends earlier.
    """
    buffer = memoryview(bytearray(min(_CHUNK_NBYTES, nbytes)))
    end = offset + nbytes
    while offset < end:
        view = buffer[: end - offset]
        source.fill(view, offset)
        hasher.update(view)
        offset += len(view)
        advance(len(view))


def hash_range(
    source: SourceFile,
    offset: int,
    nbytes: int,
    algorithm: str = "xxh3",
    progress: Progress = NO_PROGRESS,
    note: str = "",
) -> str:
    """The hash of `nbytes` bytes from `offset`, in hexadecimal digits.

    Raises:
        InputError: the file cannot be read, or ends earlier.
    """
    hasher = new_hasher(algorithm)
    feed(hasher, source, offset, nbytes, lambda n: progress.advance(n, note or source.path.name))
    return hasher.hexdigest()


def hash_files(
    paths: Iterable[Path], algorithm: str, *, workers: int | None = None, progress: Progress = NO_PROGRESS
) -> dict[Path, str]:
    """The hash of each file. hashlib lets go of the interpreter, so each of several threads has a core.

    Raises:
        InputError: a file cannot be read.
    """
    sources = [SourceFile(p) for p in dict.fromkeys(paths)]
    progress.begin(sum(s.nbytes for s in sources), f"hashing ({algorithm})")
    try:
        with ThreadPoolExecutor(workers or default_workers()) as pool:
            digests = pool.map(lambda s: hash_range(s, 0, s.nbytes, algorithm, progress), sources)
            return {s.path: digest for s, digest in zip(sources, digests, strict=True)}
    finally:
        progress.end()
        for source in sources:
            source.close()
