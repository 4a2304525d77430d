"""What a coded file is combined with, and the decoded file as something that can be read at any place.

Both published codes are an exclusive or of two byte streams. They differ in the second one: the base's file of the same
name, or a key file dealt out in blocks.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from typing import Protocol

from llmkit.errors import InputError
from llmkit.tensors.source import SourceFile


class Pad(Protocol):
    """The stream that a coded file is combined with: without end, and readable at any place."""

    @property
    def source(self) -> SourceFile:
        """The file it is made of."""

    def fill(self, view: memoryview, position: int) -> None:
        """Write its bytes from `position` on into `view`."""


@dataclass(frozen=True)
class ZeroPadded:
    """The bytes of a file, then zeros."""

    source: SourceFile

    def fill(self, view: memoryview, position: int) -> None:
        n = max(min(len(view), self.source.nbytes - position), 0)
        if n:
            self.source.fill(view[:n], position)
        if n < len(view):
            view[n:] = bytes(len(view) - n)


@dataclass(frozen=True)
class BlockwiseKey:
    """A key file in blocks of 10 MiB: block i of the data has block i of the key, from the first again after the last.

    The last block of the key is shorter, and is repeated inside its own block of data. This is not the key repeated as
    a whole: what follows the short block is the start of the key, at a multiple of 10 MiB.

    Source: the decryption script of BELLE (LianjiaTech/BELLE, models/decrypt.py), in our own words.
    """

    source: SourceFile
    block_nbytes: int = 10 * 2**20

    def fill(self, view: memoryview, position: int) -> None:
        n_blocks = -(-self.source.nbytes // self.block_nbytes)
        while len(view):
            block, inside = divmod(position, self.block_nbytes)
            start = block % n_blocks * self.block_nbytes
            length = min(self.block_nbytes, self.source.nbytes - start)
            n = min(len(view), self.block_nbytes - inside)
            self._fill_cycled(view[:n], start, length, inside % length)
            view, position = view[n:], position + n

    def _fill_cycled(self, view: memoryview, start: int, length: int, at: int) -> None:
        """`view` from byte `at` on of the `length` bytes at `start`, repeated."""
        done, turn = 0, min(len(view), length)
        while done < turn:  # one whole turn is read …
            n = min(turn - done, length - at)
            self.source.fill(view[done : done + n], start + at)
            done, at = done + n, 0
        while done < len(view):  # … and copied on: `done` stays a multiple of the length
            n = min(len(view) - done, done)
            view[done : done + n] = view[:n]
            done += n


@dataclass(frozen=True)
class Coded:
    """One file of a release and how it is decoded.

    Attributes:
        name: of the decoded file.
        payload: the coded file.
        start: where its data begins.
        pad: what it is combined with; None for a file that is taken as it is.
        sha256: of the decoded file, where the release says it.
        is_gzipped: the data is compressed.
    """

    name: str
    payload: SourceFile
    start: int = 0
    pad: Pad | None = None
    sha256: str | None = None
    is_gzipped: bool = False

    @property
    def nbytes(self) -> int | None:
        """Size of the decoded file; None when only decompressing tells."""
        return None if self.is_gzipped else self.payload.nbytes - self.start

    @property
    def label(self) -> str:
        """The coded file, for messages."""
        return str(self.payload.path)

    def sample(self, position: int, nbytes: int) -> bytes:
        """Decoded bytes; fewer at the end. Meant for small pieces: of a compressed file all before it is unpacked."""
        data = self.sample_payload(position, nbytes)
        if self.pad is None or not data:
            return data
        pad = bytearray(len(data))
        self.pad.fill(memoryview(pad), position)
        return combined(data, bytes(pad))

    def sample_payload(self, position: int, nbytes: int) -> bytes:
        """The same bytes before they are combined with the pad."""
        if self.is_gzipped:
            return self._unpacked(position + nbytes)[position:]
        return self.payload.read(
            self.start + position, max(min(nbytes, self.payload.nbytes - self.start - position), 0)
        )

    def _unpacked(self, nbytes: int) -> bytes:
        unpacker, output, at = zlib.decompressobj(31), b"", self.start
        while len(output) < nbytes and not unpacker.eof and at < self.payload.nbytes:
            n = min(2**16, self.payload.nbytes - at)
            try:
                output += unpacker.decompress(self.payload.read(at, n), nbytes - len(output))
            except zlib.error as error:
                raise InputError(f"{self.label} is damaged: gzip: {error}", hint="download it again") from error
            at += n - len(unpacker.unconsumed_tail) if unpacker.unconsumed_tail else n
        return output


def combined(a: bytes, b: bytes) -> bytes:
    """The exclusive or of two small byte strings of one length, without numpy: a dry run may call it."""
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


class SeekableCoded(io.RawIOBase):
    """A coded file seen as the decoded one: `zipfile` reads the directory of gigabytes from its last few kilobytes."""

    def __init__(self, coded: Coded) -> None:
        if coded.nbytes is None:
            raise ValueError("a compressed file has no known end")
        self._coded = coded
        self._nbytes = coded.nbytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._coded.sample(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
