"""Files that an output shares with its source, and how a later check finds that they have changed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from llmkit.errors import InputError
from llmkit.pipeline.hashing import Hasher, feed
from llmkit.pipeline.progress import Progress
from llmkit.tensors.source import SourceFile
from llmkit.tensors.stopped import Stopped

Sharing = Literal["reflink", "hard link", "copy"]
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int); where its number is another one, it is refused as unknown


def share_file(source: Path, target: Path) -> Sharing:
    """Give the bytes of `source` a second name `target`, which must not exist, with the same time of change.

    A reflink where the file system has them (btrfs, xfs, bcachefs): the file is its own, a later change of the source
    does not show in it, and programs that refuse hard links take it. Else a hard link, or on another disk a copy.
    """
    source = source.resolve()
    if _reflink(source, target):
        return "reflink"
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
    else:
        return "hard link"
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    _keep_time(source, target)
    return "copy"


def _reflink(source: Path, target: Path) -> bool:
    try:
        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            os.fsync(new.fileno())
    except OSError:  # another disk, or one that cannot: a hard link or a copy says what is wrong, if anything is
        target.unlink(missing_ok=True)
        return False
    _keep_time(source, target)
    return True


def _keep_time(source: Path, target: Path) -> None:
    stat = source.stat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


class SharedFiles:
    """Hashes files in threads while the output is written; small ones always, others where that is wanted.

    Args:
        files: where they lie, by the name they get.
        hash_all: hash large ones, too: as long as reading them takes.
        progress: is told of the bytes of large files.
        small_nbytes: how long a file is hashed at any rate: 64 MiB take 10 ms.
    """

    def __init__(
        self, files: Mapping[str, Path], *, hash_all: bool, progress: Progress, small_nbytes: int = 64 << 20
    ) -> None:
        self._sources = {name: SourceFile(path) for name, path in files.items()}
        self._hashed = [n for n, s in self._sources.items() if hash_all or s.nbytes <= small_nbytes]
        self._progress = progress
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="hashing") if self._hashed else None
        self._hashes: dict[str, Future[str]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes to hash."""
        return sum(self._sources[name].nbytes for name in self._hashed)

    def __enter__(self) -> Self:
        for name in self._hashed:
            if self._pool is not None:
                self._hashes[name] = self._pool.submit(self._hash, name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for source in self._sources.values():
            source.close()

    def entry(self, name: str, sharing: Sharing) -> dict[str, Any]:
        """What the manifest says of a shared file; waits for its hash.

        The path of the source is absolute: folders are moved without their source more often than with it, and a
        reader has another working directory.

        Raises:
            InputError: the source was changed since it was looked at.
        """
        source = self._sources[name]
        digest = self._hashes[name].result() if name in self._hashes else None
        if SourceFile(source.path).fingerprint() != source.fingerprint():
            raise InputError(
                f"{source.path} was changed while it was linked", hint="run the command again when it is complete"
            )
        entry = {"nbytes": source.nbytes, "linked": os.path.abspath(source.path)}
        entry |= {"sharing": sharing, "mtime_ns": source.mtime_ns}
        return entry if digest is None else entry | {"xxh3": digest}

    def _hash(self, name: str) -> str:
        def advance(n: int) -> None:
            if self._stop.is_set():
                raise Stopped
            self._progress.advance(n, name)

        source, hasher = self._sources[name], Hasher()
        feed(hasher, source, 0, source.nbytes, advance)
        return hasher.hexdigest()
