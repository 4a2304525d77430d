"""The files of an unfinished output while steps write them in threads."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Self

from llmkit.pipeline.commit import Partial, sync_data
from llmkit.pipeline.target import disk_errors
from llmkit.tensors.source import SourceFile

_FLUSH_S = 0.25


class Writer:
    """Writes into the files of a `Partial`, and sends what was written to the disk meanwhile.

    Inside the `with`, written pages go to the disk while others are computed, so that the last fsync finds little to
    do. What was not finished by `finish` is closed at the end.

    Attributes:
        descriptors: of the open files, by name.

    Raises (all its methods):
        OutputError: the disk refuses, or is full.
    """

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self.descriptors: dict[str, int] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._flusher = threading.Thread(target=self._flush_early, daemon=True)

    def __enter__(self) -> Self:
        self._flusher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._flusher.join()
        for name in list(self.descriptors):
            self._close(name)

    def open(self, name: str, nbytes: int) -> None:
        """Open a file, with all its bytes reserved, so that a full disk is found at the start."""
        path = self._partial.path / name
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                if os.fstat(fd).st_size != nbytes:
                    os.ftruncate(fd, 0)
                    _reserve(fd, nbytes)
            except OSError:
                os.close(fd)
                raise
        with self._guard:
            self.descriptors[name], self._locks[name] = fd, threading.Lock()

    def write(self, name: str, view: memoryview, offset: int) -> None:
        """Write bytes at an offset; one thread a file at a time, as the kernel would spin on its lock."""
        with self._locks[name], disk_errors(self._partial.path / name):
            fd = self.descriptors[name]
            while len(view):
                n = os.pwrite(fd, view, offset)
                view, offset = view[n:], offset + n

    def source(self, name: str) -> SourceFile:
        """The unfinished file, for reading."""
        return SourceFile(self._partial.path / name)

    def finish(self, name: str) -> None:
        """Fsync a file and close it."""
        with disk_errors(self._partial.path / name):
            os.fsync(self.descriptors[name])
        self._close(name)

    def _close(self, name: str) -> None:
        """Close a file. A network file system may report only now that it is full."""
        with self._guard:
            fd = self.descriptors.pop(name)
        with disk_errors(self._partial.path / name):
            os.close(fd)

    def _flush_early(self) -> None:
        while not self._ended.wait(_FLUSH_S):
            with self._guard:
                descriptors = [os.dup(fd) for fd in self.descriptors.values()]
            for fd in descriptors:
                with contextlib.suppress(OSError):  # the fsync at the end reports it
                    sync_data(fd)
                os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    """Make the file `nbytes` long; where the system can, with blocks of the disk for all of them."""
    if not nbytes:
        return
    reserve = getattr(os, "posix_fallocate", None)  # macOS has none
    if reserve is not None:
        reserve(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)
