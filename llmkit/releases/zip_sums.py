"""The check sums that a torch file carries of itself, compared while the file is written.

A torch file is a zip, and a zip has the CRC-32 of each entry in its directory. A payload or a base that was damaged in
one bit of one weight gives a model that looks whole, opens and runs; its check sums tell.

They do not tell another base of the same layout that is sound in itself. An exclusive or of three files has the
exclusive or of their three sums (CRC-32 is linear in that sense), and so has its directory. See `kinship.py`.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import IO

# What `zipfile` raises for a file that is no zip, or a damaged one.
BROKEN_ZIP = (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Entry:
    """One stored entry: its name, its bytes `start:stop` in the file and its CRC-32."""

    name: str
    start: int
    stop: int
    crc: int


def read_directory(file: IO[bytes]) -> list[Entry]:
    """The stored entries of a zip in file order, empty where its writer computed no check sums.

    torch can be told to leave them out and puts other numbers there. The entry `version` shows it: its sum is known.

    Raises:
        zipfile.BadZipFile, struct.error, ValueError, NotImplementedError (`BROKEN_ZIP`): no zip, or a damaged one.
    """
    with zipfile.ZipFile(file) as archive:
        entries = []
        for info in sorted(archive.infolist(), key=lambda i: i.header_offset):
            if info.compress_type != zipfile.ZIP_STORED or not info.file_size:
                continue
            file.seek(info.header_offset)
            head = file.read(30)
            if head[:4] != b"PK\x03\x04":
                raise zipfile.BadZipFile(f"no entry at byte {info.header_offset}, where its directory has one")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            entries.append(Entry(info.filename, start, start + info.file_size, info.CRC))
    for entry in entries:
        if entry.name.rpartition("/")[2] == "version" and entry.stop - entry.start < 16:
            file.seek(entry.start)
            text = file.read(entry.stop - entry.start)
            if text.strip().isdigit() and zlib.crc32(text) != entry.crc:
                return []
    return entries


@dataclass
class ZipSums:
    """Compares the entries of a file with their check sums as its bytes pass by, in order.

    Attributes:
        wrong: names of the entries that have another sum.
    """

    entries: list[Entry]
    wrong: list[str] = field(default_factory=list)
    _index: int = 0
    _crc: int = 0
    _position: int = 0

    def update(self, view: memoryview) -> None:
        """The next bytes of the file."""
        begin, end = self._position, self._position + len(view)
        self._position = end
        while self._index < len(self.entries) and self.entries[self._index].start < end:
            entry = self.entries[self._index]
            low, high = max(entry.start, begin), min(entry.stop, end)
            self._crc = zlib.crc32(view[low - begin : high - begin], self._crc)
            if entry.stop > end:
                return
            if self._crc != entry.crc:
                self.wrong.append(entry.name)
            self._index, self._crc = self._index + 1, 0
