"""A journal: lines of JSON in a file, of which the first says what work they belong to.

Each line is written by one call and is whole or, after a crash or on a full disk, the last one and ignored. While a
process has the journal open, no other one gets it.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.errors import OutputError

_START = b'{"plan": "'


class HeldElsewhere(OutputError):
    """Another process has the journal open."""


class Journal:
    """The journal of one piece of work.

    Args:
        path: the file, made where there is none; its folder must exist.
        digest: identifies the work. Entries of other work are dropped.
        resume: take the entries of an earlier run.
        subject: what is written, for messages.
        clear: called before entries of other work, or of a run that shall not be resumed, are dropped.

    Attributes:
        entries: what earlier runs of the same work wrote, in order.

    Raises:
        HeldElsewhere: another process has it open.
        OutputError: it is a file of another kind.
        OSError: it cannot be opened or written.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        *,
        resume: bool = True,
        subject: str = "",
        clear: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._guard = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND, 0o644)
        try:
            take_lock(self._fd, path, subject or str(path))
            data = _read(self._fd)
            if not _starts(data):
                raise OutputError(
                    f"{path} exists and is no journal of llmkit's, which would be written there",
                    hint="move it away, or choose another -o",
                )
            entries, sound_nbytes = _parse(data)
            if resume and entries and entries[0].get("plan") == digest:
                self.entries = entries[1:]
                os.ftruncate(self._fd, sound_nbytes)
            else:
                if clear is not None:
                    clear()
                os.ftruncate(self._fd, 0)
                self.append({"plan": digest})
        except BaseException:
            self.close()
            raise

    def append(self, entry: dict[str, Any]) -> None:
        """One more line."""
        line = memoryview((json.dumps(entry) + "\n").encode())
        with self._guard:
            while len(line):
                line = line[os.write(self._fd, line) :]

    def close(self) -> None:
        """Release the lock; the file stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # a network's disk may say only now that it is full: lines lost are done again
                os.close(fd)

    def remove(self) -> None:
        """Release the lock and remove the file: the work is done."""
        self.path.unlink(missing_ok=True)
        self.close()


def take_lock(fd: int, path: Path, subject: str) -> None:
    """Lock an open file for this process, until it is closed.

    Args:
        fd: of the file.
        path: where it was opened.
        subject: what is written, for the message.

    Raises:
        HeldElsewhere: another process has it, or has finished and moved it meanwhile.
    """
    held = _held(subject)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise held from None
    try:
        is_same = os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        is_same = False
    if not is_same:  # it was finished and removed between opening and locking
        raise held


def is_journal(path: Path) -> bool:
    """Whether the file is a journal, or the first part of one (of a run that was killed at its first line)."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return _starts(file.read(len(_START)))
    except OSError:
        return False


def require_free(path: Path, subject: str) -> None:
    """Check, before work begins, that no other process has the journal open.

    Raises:
        HeldElsewhere: it has.
    """
    if is_journal(path):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _held(subject) from None
            finally:
                os.close(fd)


def _held(subject: str) -> HeldElsewhere:
    return HeldElsewhere(f"{subject} is being written by another llmkit process", hint="wait until it has ended")


def _starts(data: bytes) -> bool:
    return data.startswith(_START) or _START.startswith(data)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a journal, header included; empty if the file is missing or is no journal."""
    try:
        if path.is_symlink() or not path.is_file():
            return []
        entries = _parse(path.read_bytes())[0]
    except OSError:
        return []
    return entries if entries and isinstance(entries[0].get("plan"), str) else []


def _parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Entries, and how many bytes they take."""
    entries: list[dict[str, Any]] = []
    sound = 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break  # the line that was being written when the run was killed
        entries.append(entry)
        sound += len(line)
    return entries, sound


def _read(fd: int) -> bytes:
    chunks, position = [], 0
    while chunk := os.pread(fd, 1 << 20, position):
        chunks.append(chunk)
        position += len(chunk)
    return b"".join(chunks)
