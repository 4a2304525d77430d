"""Nothing is at its final path until it is whole: `OUT.partial/`, a journal, fsync, one rename."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from llmkit.errors import OutputError
from llmkit.pipeline.sharing import Sharing, share_file
from llmkit.tensors.spec import format_bytes

__all__ = ["Partial", "check_output", "disk_errors"]

JOURNAL = ".journal.jsonl"


def check_output(out: Path, *, inputs: list[Path], overwrite: bool, need_nbytes: int) -> None:
    """Refuse before any work what could not be committed after it.

    Raises:
        OutputError: the output exists, is one of the inputs, its parent is missing or the disk is too small.
    """
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: the folder {out.parent} does not exist", hint=f"mkdir -p {out.parent}")
    place = out.resolve()
    for path in inputs:
        named = path.parent.resolve() / path.name  # a link in a hub's cache lies elsewhere than what it leads to
        if any(place == p or place in p.parents for p in (path.resolve(), named)):
            raise OutputError(
                f"{out} holds an input ({path}), which would be deleted", hint="write to another folder: -o OUT"
            )
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise OutputError(f"{out} already exists", hint="choose another -o, or add --overwrite to replace it")
        is_checkpoint = out.is_dir() and (
            not any(out.iterdir()) or any((out / n).is_file() for n in ("llmkit.json", "config.json"))
        )
        if not is_checkpoint:
            raise OutputError(f"{out} is no checkpoint folder; --overwrite will not delete it")
    partial = partial_path(out)
    have = sum(p.stat().st_blocks * 512 for p in partial.iterdir() if p.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(out.parent).free
    if need_nbytes > free + have:
        raise OutputError(
            f"{out}: needs {format_bytes(need_nbytes)}, the disk has {format_bytes(free + have)} free",
            hint="free some space or choose another -o",
        )


def partial_path(out: Path) -> Path:
    """The folder that becomes `out`."""
    return out.with_name(out.name + ".partial")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"cannot write {path}: {error.strerror}",
                hint="free some space and run the same command again: it resumes",
            ) from error
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = "choose another -o, where you may write" if refused else None
        raise OutputError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error


class Partial:
    """The unfinished output: its folder, its lock, its journal.

    Attributes:
        done: entries of the journal of an earlier run of the same plan, by step name.
        has_records: whether any step is finished, so that resuming is worth something.
    """

    def __init__(self, out: Path, digest: str, *, resume: bool) -> None:
        self.out = out
        self.path = partial_path(out)
        self.done: dict[str, dict[str, Any]] = {}
        self.has_records = False
        self._guard = threading.Lock()
        with disk_errors(self.path):
            self._lock_fd = self._lock()
            earlier = self._read_journal()
            is_same = resume and bool(earlier) and earlier[0].get("plan") == digest
            if is_same:
                self.done = {e["step"]: e for e in earlier[1:]}
                self.has_records = bool(self.done)
            else:
                self._clear()
            self._journal = (self.path / JOURNAL).open("a", encoding="utf-8")
            if not is_same:
                self._append({"plan": digest})

    def _lock(self) -> int:
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / JOURNAL).exists():
            raise OutputError(f"{self.path} exists and is not llmkit's; move it away")
        self.path.mkdir(exist_ok=True)
        fd = os.open(self.path / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OutputError(f"{self.out} is being written by another llmkit process") from None
        return fd

    def _read_journal(self) -> list[dict[str, Any]]:
        entries, sound = [], 0
        for line in (self.path / JOURNAL).read_bytes().splitlines(keepends=True):
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the run was killed
            sound += len(line)
        os.truncate(self.path / JOURNAL, sound)
        return entries

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.truncate(self.path / JOURNAL, 0)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._guard:
            self._journal.write(json.dumps(entry) + "\n")
            self._journal.flush()

    def record(self, step: str, entry: dict[str, Any]) -> None:
        """Note that a step is written. Its hashes are checked again before a resumed run trusts it."""
        with disk_errors(self.path / JOURNAL):
            self._append({"step": step, **entry})
        self.has_records = True

    def open_file(self, name: str, nbytes: int) -> int:
        """A descriptor of an output file with all its bytes reserved, so that a full disk is found at the start."""
        path = self.path / name
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(fd).st_size != nbytes:
                    os.ftruncate(fd, 0)
                    if nbytes:
                        os.posix_fallocate(fd, 0, nbytes)
            except OSError:
                os.close(fd)
                raise
        return fd

    def write_file(self, name: str, data: bytes) -> None:
        """Write and sync a small file."""
        path = self.path / name
        with disk_errors(path), path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def link(self, name: str, source: Path) -> Sharing:
        """Give `source` another name in the folder, sharing its bytes where the disk can."""
        path = self.path / name
        path.unlink(missing_ok=True)
        with disk_errors(path):
            return share_file(source, path)

    def commit(self) -> None:
        """Make it final: drop the journal, sync the folder, rename."""
        with disk_errors(self.out):
            self._journal.close()
            (self.path / JOURNAL).unlink()
            _sync_folder(self.path)
            replaced = None
            if self.out.exists():
                replaced = self.out.with_name(f"{self.out.name}.replaced-{os.getpid()}")
                self.out.rename(replaced)
            self.path.rename(self.out)
            _sync_folder(self.out.parent)
            if replaced is not None:
                _remove(replaced)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """What stays of an unfinished run: all after Ctrl-C, finished steps after a full disk, nothing otherwise."""
        if kind is None:
            return
        self.close()
        is_kept = issubclass(kind, KeyboardInterrupt) or (issubclass(kind, OutputError) and self.has_records)
        if not is_kept:
            self.discard()

    def discard(self) -> None:
        """Remove what was written: it could never be resumed."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock; what was written stays for a resumed run."""
        self._journal.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one, whose target stays."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
