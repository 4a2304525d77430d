"""Bytes on disk: an input file that is opened late, read with pread, and never trusted to stay as it was."""

from __future__ import annotations

import os
import shlex
import threading
from pathlib import Path
from stat import S_ISREG

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.tensors.spec import TensorSpec

AGAIN = "download or copy the file again"
"""The hint for a damaged file."""


class SourceFile:
    """A file whose size and modification time were noted when its header was read.

    Reading uses `pread` into fresh memory rather than a mapping: a file that shrinks under us is then a clear error
    instead of a SIGBUS, and the memory in use is exactly what a step asked for.

    Raises:
        InputError: it cannot be read, or aria2, which gives it its whole length at once, has not fetched all of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if not S_ISREG(stat.st_mode):
            raise InputError(f"{path} is no regular file")
        if (record := path.with_name(f"{path.name}.aria2")).exists():
            raise InputError(
                f"{path} is not fetched whole: beside it lies {record.name}, which aria2 removes at the end",
                hint=f"aria2c -c URL goes on; or, if the file is whole, rm {shlex.quote(str(record))}",
            )
        self.nbytes = stat.st_size
        self.mtime_ns = stat.st_mtime_ns
        self._inode = (stat.st_dev, stat.st_ino)
        self._fd: int | None = None
        self._fingerprint: str | None = None
        self._lock = threading.Lock()

    def fingerprint(self) -> str:
        """Identifies the file without reading it: path, size and modification time."""
        if self._fingerprint is None:
            self._fingerprint = f"{self.path.resolve()}:{self.nbytes}:{self.mtime_ns}"
        return self._fingerprint

    def check_unchanged(self) -> None:
        """Compare the file with what it was when its header was read: size, modification time and inode.

        Raises:
            InputError: it was written to, replaced or removed.
        """
        try:
            stat = self.path.stat()
            is_same = (stat.st_size, stat.st_mtime_ns) == (self.nbytes, self.mtime_ns)
            is_same = is_same and (stat.st_dev, stat.st_ino) == self._inode
        except OSError:
            is_same = False
        if not is_same:
            raise InputError(
                f"{self.path} was changed while it was read: the output would be of neither file",
                hint="run the command again when it is complete",
            )

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`."""
        return bytes(self.read_into(offset, nbytes))

    def head(self, nbytes: int) -> bytes:
        """The first `nbytes` bytes; all of a shorter file."""
        return self.read(0, min(nbytes, self.nbytes))

    def read_into(self, offset: int, nbytes: int) -> memoryview:
        """Exactly `nbytes` bytes from `offset`, in memory of their own."""
        view = memoryview(bytearray(nbytes))
        self.fill(view, offset)
        return view

    def read_tensor(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor [numel] of the elements stored from byte `offset`."""
        flat = torch.empty(numel, dtype=dtype)
        if numel:
            self.fill(flat.view(torch.uint8).numpy().data, offset)
        return flat

    def fill(self, view: memoryview, offset: int) -> None:
        """Read into `view`, all of it, from `offset` on."""
        fd = self.fileno()
        done = 0
        while done < len(view):
            try:
                n = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                raise InputError(f"cannot read {self.path} at byte {offset + done}: {error.strerror}") from error
            if n == 0:
                raise InputError(
                    f"{self.path} ended at byte {offset + done}; expected {self.nbytes} bytes as when it was opened",
                    hint="the file changed while it was read: run the command again on a complete file",
                )
            done += n

    def fileno(self) -> int:
        """The descriptor, open for reading."""
        if self._fd is None:
            with self._lock:
                if self._fd is None:
                    try:
                        self._fd = os.open(self.path, os.O_RDONLY)
                    except OSError as error:
                        raise InputError(f"cannot open {self.path}: {error.strerror}") from error
        return self._fd

    def close(self) -> None:
        """Close the descriptor; a later read opens it again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None and os is not None:  # at interpreter exit modules are gone before objects
            os.close(fd)

    def __repr__(self) -> str:
        return f"SourceFile({str(self.path)!r})"


def bytes_of(data: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor of any dtype and shape, in row-major order; without a copy where it is contiguous."""
    flat = data.contiguous().reshape(-1)
    if flat.numel() == 1:  # whose stride torch leaves as it was
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_of(data: bytes | bytearray | memoryview, spec: TensorSpec) -> torch.Tensor:
    """Bytes in row-major order as a CPU tensor; without a copy where they may be written to."""
    if not len(data):
        return torch.empty(spec.shape, dtype=spec.dtype.torch)
    view = memoryview(data)
    flat = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
    return flat.view(spec.dtype.torch).view(spec.shape)
