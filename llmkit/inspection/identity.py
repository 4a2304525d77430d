"""Which published files these are, and a hash of what a model holds that does not depend on the files it is in.

The content hash is the SHA-256 of one line a tensor, in order of their names: the JSON array [name, dtype, shape,
SHA-256 of the bytes in row order] and a line feed. Names are those of the opened checkpoint, so that any shard size, a
torch file, safetensors and (where llmkit reads it) another layout give the same hash for the same weights. The bytes
are hashed tensor by tensor rather than as one stream: so several cores can share the work.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.lazy_imports import torch
from llmkit.pipeline.hashing import hash_range
from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.releases.published import KNOWN, PublishedFile, identify
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import SourceFile
from llmkit.transforms.delta.base_check import BF16_ROUNDED, bf16_share


@dataclass(frozen=True)
class FileIdentity:
    """A file, its SHA-256 and the published file that it is.

    Attributes:
        is_weights: it holds tensors.
        release, published_as: what it belongs to and its name there; None for an unknown file.
        is_prefix_match: only the first and last digits of the published hash are known, and fit.
        source: where the published hash was read.
    """

    name: str
    nbytes: int
    sha256: str
    is_weights: bool
    release: str | None = None
    published_as: str | None = None
    is_prefix_match: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Identity:
    """What a model is, by its hashes.

    Attributes:
        releases: release -> how many of the weight files are its.
        content: the content hash.
        bf16_share: share of sampled float16 weights with three zero low bits; None without any.
        notes: what the hashes mean.
    """

    files: tuple[FileIdentity, ...]
    releases: dict[str, int]
    content: str
    bf16_share: float | None
    notes: tuple[str, ...]


def identify_model(
    ckpt: Checkpoint,
    *,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
    table: Sequence[PublishedFile] = KNOWN,
) -> Identity:
    """Hash every file and every tensor of a checkpoint. Reads all of it, twice; the second time from the page cache.

    Args:
        table: published files, to be recognized.
    """
    weights = _weight_files(ckpt)
    paths = [*weights, *(c.path for c in ckpt.files.values() if c.path is not None)]
    sources = {p: SourceFile(p) for p in dict.fromkeys(paths)}
    jobs = _Jobs(workers, progress, sum(s.nbytes for s in sources.values()) + ckpt.nbytes)
    with jobs:
        files = {}
        # A file, then the tensors that begin in it: the second reading finds the first one's pages.
        by_file = _by_first_file(ckpt)
        tensors: dict[str, Future[str]] = {}
        for path, source in sources.items():
            files[path] = jobs.submit(hash_range, source, 0, source.nbytes, "sha256", progress)
            for name in by_file.pop(path, ()):
                tensors[name] = jobs.submit(_tensor_hash, name, ckpt.tensors[name], progress)
        for name in (n for names in by_file.values() for n in names):
            tensors[name] = jobs.submit(_tensor_hash, name, ckpt.tensors[name], progress)
        jobs.wait([*files.values(), *tensors.values()])
    identities = tuple(
        _file_identity(sources[path], future.result(), path in weights, table) for path, future in files.items()
    )
    releases: dict[str, int] = {}
    for file in identities:
        if file.is_weights and file.release is not None:
            releases[file.release] = releases.get(file.release, 0) + 1
    share = bf16_share(ckpt)
    return Identity(
        files=identities,
        releases=releases,
        content=_combined(ckpt, {name: future.result() for name, future in tensors.items()}),
        bf16_share=share,
        notes=tuple(_notes(identities, share)),
    )


def _combined(ckpt: Checkpoint, digests: dict[str, str]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(digests):
        lazy = ckpt.tensors[name]
        line = json.dumps([name, lazy.dtype.name, list(lazy.shape), digests[name]], ensure_ascii=True)
        hasher.update(line.encode() + b"\n")
    return hasher.hexdigest()


class _Jobs:
    """A pool that stops at the first failure, and draws the progress."""

    def __init__(self, workers: int | None, progress: Progress, total: int) -> None:
        self._pool = ThreadPoolExecutor(workers or default_workers())
        self.submit = self._pool.submit
        self._progress = progress
        self._total = total

    def __enter__(self) -> _Jobs:
        self._progress.begin(self._total, "hashing (sha256)")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._progress.end()

    def wait(self, futures: list[Future[str]]) -> None:
        """All of them, or the first error."""
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


_LOADING = threading.Lock()


def _tensor_hash(name: str, lazy: Lazy, progress: Progress) -> str:
    node = lazy.node
    if isinstance(node, Read) and node.strides is None:
        return hash_range(node.source, node.offset, lazy.spec.nbytes, "sha256", progress, name)
    with _LOADING, torch.inference_mode():  # one at a time: a computed tensor is in memory as a whole
        data = lazy.load().contiguous().reshape(-1)
        digest = hashlib.sha256(data.view(torch.uint8).numpy().data if data.numel() else b"").hexdigest()
    progress.advance(lazy.spec.nbytes, name)
    return digest


def _weight_files(ckpt: Checkpoint) -> list[Path]:
    return sorted({r.source.path for t in ckpt.tensors.values() for r in t.reads()})


def _by_first_file(ckpt: Checkpoint) -> dict[Path | None, list[str]]:
    by_file: dict[Path | None, list[str]] = {}
    for name, lazy in ckpt.tensors.items():
        reads = lazy.reads()
        by_file.setdefault(reads[0].source.path if reads else None, []).append(name)
    return by_file


def _file_identity(file: SourceFile, sha256: str, is_weights: bool, table: Sequence[PublishedFile]) -> FileIdentity:
    name, release = file.path.name, identify(sha256, table)
    if release is None:
        return FileIdentity(name, file.nbytes, sha256, is_weights)
    return FileIdentity(
        name, file.nbytes, sha256, is_weights, release.release, release.file, release.is_partial, release.where
    )


def _notes(files: tuple[FileIdentity, ...], share: float | None) -> Iterator[str]:
    for file in files:
        if file.is_prefix_match:
            yield (
                f"{file.name}: only the first and last digits of the published hash are known to llmkit, and they fit "
                "(prefix match)"
            )
        if file.published_as is not None and file.published_as != file.name:
            yield f"{file.name} was published as {file.published_as}"
    unknown = [f.name for f in files if f.is_weights and f.release is None]
    if unknown:
        yield (
            f"{len(unknown)} weight file{'s are' if len(unknown) > 1 else ' is'} not in llmkit's table of published "
            "hashes. That says nothing of the weights: the hash of a torch file changes with the version of torch that "
            "saved it, that of any file with the shard size. Compare the content hash with that of a copy you trust"
        )
    if share is not None and share > BF16_ROUNDED:
        yield (
            f"the float16 weights were rounded to bfloat16 ({share:.1%} have three zero low bits, usually 13 %): "
            "published hashes, XOR releases and the sums of deltas cannot match"
        )
