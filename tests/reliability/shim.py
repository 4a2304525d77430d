"""Counts what a process does to the files below a folder, and kills it or fills the disk at the n-th operation.

Wraps the functions of `os` (which pathlib, shutil and tempfile call by name), `open` for writing, and the one system
call that llmkit makes itself. Reading is not counted. Needs Linux's /proc, to know the path of a descriptor.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmkit.pipeline.rename

__all__ = ["Shim"]

BY_PATH = ("mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "truncate", "utime")
BY_DESCRIPTOR = ("write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "close")
# What a full disk refuses: all that may need a new block. The rest goes on working.
NEEDS_SPACE = ("open", "mkdir", "rename", "replace", "link", "symlink", "write", "pwrite", "posix_fallocate", "fsync",
               "close", "renameat2")  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Shim:
    """Installed in a process that is to be killed or to find the disk full.

    Args:
        root: operations on what lies below it are counted.
        at: the number of the operation (from 1) at which it happens; 0 only counts.
        is_full: from then on the disk is full; else the process is killed before the operation.
        is_torn: a write is done by half first.
        log: operations are appended to it, one a line; None for none.
    """

    def __init__(
        self, root: Path, at: int = 0, *, is_full: bool = False, is_torn: bool = False, log: Path | None = None
    ) -> None:
        self.root = str(root.resolve())
        self.at, self.is_full, self.is_torn = at, is_full, is_torn
        self.n = 0
        self._os: dict[str, Callable[..., Any]] = {n: getattr(os, n) for n in (*BY_PATH, *BY_DESCRIPTOR, "open")}
        self._log = self._os["open"](log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log is not None else -1
        self._written: set[int] = set()
        self._guard = threading.RLock()

    def install(self) -> None:
        """Take the place of the system's functions."""
        for name in BY_PATH:
            setattr(os, name, self._by_path(name))
        for name in BY_DESCRIPTOR:
            setattr(os, name, self._by_descriptor(name))
        os.open = self._open  # type: ignore[assignment]
        plain, system = io.open, llmkit.pipeline.rename._system_rename

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, str | bytes | os.PathLike) and set(mode) & set("wax+") and self._is_below(file):
                self._count("open", file)
            return plain(file, mode, *args, **kwargs)

        def renamed(source: Path, target: Path, flags: dict[str, int]) -> bool:
            self._count("renameat2", target)
            return system(source, target, flags)

        io.open = builtins.open = opened  # type: ignore[assignment]
        llmkit.pipeline.rename._system_rename = renamed

    def _by_path(self, name: str) -> Callable[..., Any]:
        system = self._os[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            folder = kwargs.get("dir_fd")
            where = args[-1] if name in ("rename", "replace", "link", "symlink") else args[0]
            path = os.path.join(self._path_of(folder), os.fsdecode(where)) if folder is not None else where
            if not isinstance(path, int) and self._is_below(path):
                self._count(name, path)
            return system(*args, **kwargs)

        return call

    def _by_descriptor(self, name: str) -> Callable[..., Any]:
        system = self._os[name]

        def call(fd: int, *args: Any) -> Any:
            if fd in self._written:
                if name == "close":
                    self._written.discard(fd)
                half = (lambda: system(fd, args[0][: len(args[0]) // 2], *args[1:])) if "write" in name else None
                try:
                    self._count(name, self._path_of(fd), half)
                except OSError:
                    if name == "close":
                        system(fd)  # the descriptor is gone whatever close says
                    raise
            return system(fd, *args)

        return call

    def _open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        is_counted = bool(flags & _WRITES) and "dir_fd" not in kwargs and self._is_below(path)
        if is_counted:
            self._count("open", path)
        fd: int = self._os["open"](path, flags, *args, **kwargs)
        if is_counted:
            self._written.add(fd)
        return fd

    def _is_below(self, path: Any) -> bool:
        found = os.path.abspath(os.fsdecode(path))
        return found == self.root or found.startswith(self.root + os.sep)

    @staticmethod
    def _path_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def _count(self, name: str, path: Any, half: Callable[[], Any] | None = None) -> None:
        with self._guard:
            self.n += 1
            if self._log >= 0:
                shown = os.path.relpath(os.fsdecode(path), self.root)
                self._os["write"](self._log, f"{name} {shown}\n".encode())
            if not self.at or self.n < self.at:
                return
            if self.is_full:
                if name in NEEDS_SPACE:
                    if half is not None and self.n == self.at:
                        half()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
            elif self.n == self.at:
                if self.is_torn and half is not None:
                    half()
                os.kill(os.getpid(), signal.SIGKILL)
