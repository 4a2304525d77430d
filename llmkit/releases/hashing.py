"""Hashes of whole files, several at a time: hashlib lets go of the interpreter, so each thread has a core."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.tensors.source import SourceFile

__all__ = ["hash_files", "hash_range", "new_hasher"]

_CHUNK_NBYTES = 2**20


def new_hasher(algorithm: str) -> Any:
    """A hasher by name: md5, sha1, sha256 (none is used against forgery), or xxh3."""
    return xxh3_128() if algorithm == "xxh3" else hashlib.new(algorithm, usedforsecurity=False)


def hash_files(
    paths: Iterable[Path], algorithm: str, *, workers: int | None = None, progress: Progress = NO_PROGRESS
) -> dict[Path, str]:
    """The hash of each file, in hexadecimal digits.

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


def hash_range(
    source: SourceFile, offset: int, nbytes: int, algorithm: str, progress: Progress = NO_PROGRESS, note: str = ""
) -> str:
    """The hash of `nbytes` bytes from `offset`."""
    hasher = new_hasher(algorithm)
    buffer = memoryview(bytearray(min(_CHUNK_NBYTES, nbytes)))
    end = offset + nbytes
    while offset < end:
        view = buffer[: end - offset]
        source.fill(view, offset)
        hasher.update(view)
        offset += len(view)
        progress.advance(len(view), note or source.path.name)
    return str(hasher.hexdigest())
