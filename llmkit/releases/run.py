"""Decode a release: several files at a time, in chunks, hashed as they are written; final only when all are right."""

from __future__ import annotations

import contextlib
import gzip
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import MANIFEST_FORMAT, versions
from llmkit.errors import InputError
from llmkit.formats.torch_pickle import looks_like
from llmkit.pipeline.commit import Partial, finish_earlier, sync_data
from llmkit.pipeline.pool import default_workers, run_all
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.pipeline.target import Target, disk_errors
from llmkit.releases.decoding import Decoding, check_samples, check_whole
from llmkit.releases.hash_list import Expected
from llmkit.releases.hashing import hash_range, new_hasher
from llmkit.releases.streams import Coded
from llmkit.releases.zip_sums import BROKEN_ZIP, Entry, ZipSums, read_directory
from llmkit.tensors.source import SourceFile

__all__ = ["CHUNK_NBYTES", "run_decoding"]

# Fits the second-level cache with its pad; three are in use for each file.
CHUNK_NBYTES = 2**20
_RING = 3


def run_decoding(
    decoding: Decoding,
    target: Target,
    *,
    expect: Mapping[str, Expected] | None = None,
    is_confirmed: bool = False,
    resume: bool = True,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write the decoded files and return the manifest.

    Args:
        target: where they go, and what may give way.
        expect: stated hashes of decoded files, by name.
        is_confirmed: the base has the stated hashes; like `expect` it leaves nothing for statistics to find.
        resume: keep the whole files of an interrupted run of the same release.
        workers: files in flight at a time.

    Raises:
        OutputError: the output exists or cannot be written.
        InputError: base, key or payload are wrong or damaged, found by the samples, a hash, a check sum or the index.
    """
    digest = decoding.digest()
    if (finished := finish_earlier(target, digest)) is not None:
        return dict(finished)
    target.check(decoding.need_nbytes)
    sums = check_samples(decoding, progress)
    started = time.monotonic()
    progress.begin(decoding.write_nbytes, f"decoding {target.out.name}")
    try:
        with Partial(target, digest, resume=resume) as partial:
            if partial.finished is not None:
                partial.commit()
                return partial.finished
            run = _Run(decoding, partial, sums, expect or {}, progress)
            run.execute(workers or default_workers())
            check_whole(decoding, partial.path)
            warnings = [] if expect or is_confirmed else list(decoding.judge(partial.path))
            manifest = {
                "format": MANIFEST_FORMAT,
                "versions": versions(),
                "recipe": [dict(decoding.step)],
                "notes": list(decoding.notes),
                "warnings": warnings,
                "inputs": [{"path": p, "nbytes": n, "tensors": {}} for p, n in decoding.inputs.items()],
                "files": dict(sorted(run.files.items())),
                "tensors": {},
                "run": {
                    "elapsed_s": round(time.monotonic() - started, 3),
                    "steps_resumed": run.n_resumed,
                    "nbytes_resumed": run.nbytes_resumed,
                },
            }
            partial.finish(manifest, decoding.sources)
    finally:
        progress.end()
    return manifest


class _Run:
    def __init__(
        self,
        decoding: Decoding,
        partial: Partial,
        sums: Mapping[str, list[Entry]],
        expect: Mapping[str, Expected],
        progress: Progress,
    ) -> None:
        self.decoding = decoding
        self.partial = partial
        self.sums = sums
        self.expect = expect
        self.progress = progress
        self.files: dict[str, dict[str, Any]] = {}
        self.n_resumed = 0
        self.nbytes_resumed = 0
        self._stop = threading.Event()
        self._flushed: set[int] = set()
        self._guard = threading.Lock()

    def execute(self, workers: int) -> None:
        flusher = threading.Thread(target=self._flush_early, daemon=True)
        flusher.start()
        largest_first = sorted(self.decoding.files, key=lambda c: -c.payload.nbytes)
        try:
            run_all(ThreadPoolExecutor(workers), self._decode, largest_first, self._stop)
        finally:
            self._stop.set()
            flusher.join()

    def _flush_early(self) -> None:
        """Send written pages to the disk meanwhile, so that the fsync at the end of a file finds little to do."""
        while not self._stop.wait(0.25):
            with self._guard:
                fds = [os.dup(fd) for fd in self._flushed]
            for fd in fds:
                with contextlib.suppress(OSError):  # the fsync at the end reports it
                    sync_data(fd)
                os.close(fd)

    def _decode(self, coded: Coded) -> None:
        if self._stop.is_set() or self._resumed(coded):
            return
        meter = _Meter(self._algorithms(coded), self.sums[coded.name])
        path = self.partial.path / coded.name
        fd = self.partial.open_file(coded.name, coded.nbytes or 0)
        try:
            with self._guard:
                self._flushed.add(fd)
            with ThreadPoolExecutor(1) as hasher:
                position = 0
                for view, chunk_done in _decoded_chunks(coded, hasher):
                    if self._stop.is_set():
                        return
                    chunk_done(hasher.submit(meter.update, view))
                    with disk_errors(path):
                        _pwrite(fd, view, position)
                    position += len(view)
                    self.progress.advance(len(view), coded.name)
            with disk_errors(path):
                os.fsync(fd)
        finally:
            with self._guard:
                self._flushed.discard(fd)
            self.partial.close_file(coded.name, fd)
        self._check(coded, meter, path)
        entry = {"nbytes": position, **meter.digests()}
        self.partial.record(coded.name, {"file": entry})
        with self._guard:
            self.files[coded.name] = entry

    def _algorithms(self, coded: Coded) -> list[str]:
        stated = self.expect.get(coded.name)
        wanted = ["xxh3", "sha256" if coded.sha256 else "", stated.algorithm if stated else ""]
        return [a for a in dict.fromkeys(wanted) if a]

    def _check(self, coded: Coded, meter: _Meter, path: Path) -> None:
        """The decoded file against what is known of it."""
        found = meter.digests()
        if coded.sha256 is not None and found["sha256"] != coded.sha256:
            raise self.decoding.failure(
                f"{coded.label} decodes to sha256 {found['sha256'][:16]}…, it says {coded.sha256[:16]}…: "
                f"{self.decoding.culprit}, or the file is damaged",
                self.progress,
            )
        if coded.is_gzipped:
            _check_unpacked(path, meter)
        if meter.zip.wrong:
            n, names = len(meter.zip.wrong), meter.zip.entries
            raise self.decoding.failure(
                f"{coded.label} decodes to a torch file in which {n} of {len(names)} entries have a wrong check sum, "
                f"{meter.zip.wrong[0]} first: {self.decoding.culprit}, or the file is damaged"
            )
        stated = self.expect.get(coded.name)
        if stated is not None and found[stated.algorithm] != stated.digest:
            raise self.decoding.failure(
                f"{coded.label} decodes to {stated.algorithm} {found[stated.algorithm]}, expected {stated.digest}: "
                f"{self.decoding.culprit}, or the file is damaged"
            )

    def _resumed(self, coded: Coded) -> bool:
        """Whether an earlier run wrote this file, and its bytes still have the hash that was noted."""
        entry = self.partial.done.get(coded.name, {}).get("file")
        path = self.partial.path / coded.name
        stated = self.expect.get(coded.name)
        if entry is None or not path.is_file() or path.stat().st_size != entry["nbytes"]:
            return False
        if stated is not None and entry.get(stated.algorithm) != stated.digest:
            return False
        source = SourceFile(path)
        if hash_range(source, 0, source.nbytes, "xxh3", self.progress) != entry["xxh3"]:
            return False
        with self._guard:
            self.files[coded.name] = entry
            self.n_resumed += 1
            self.nbytes_resumed += source.nbytes
        return True


class _Meter:
    """The hashes and check sums of one file as its chunks pass by."""

    def __init__(self, algorithms: list[str], entries: list[Entry]) -> None:
        self._hashers = {name: new_hasher(name) for name in algorithms}
        self.zip = ZipSums(entries)

    def update(self, view: memoryview) -> None:
        """The next bytes."""
        for hasher in self._hashers.values():
            hasher.update(view)
        self.zip.update(view)

    def digests(self) -> dict[str, str]:
        """Algorithm -> hexadecimal digits."""
        return {name: hasher.hexdigest() for name, hasher in self._hashers.items()}


def _decoded_chunks(
    coded: Coded, hasher: ThreadPoolExecutor
) -> Iterator[tuple[memoryview, Callable[[Future[None]], None]]]:
    """The decoded file in chunks, each with a function that takes the work to end before its memory is reused."""
    import numpy as np

    ring = [memoryview(bytearray(CHUNK_NBYTES)) for _ in range(_RING)]
    pending: list[Future[None] | None] = [None] * _RING
    pad = memoryview(bytearray(CHUNK_NBYTES))
    position, turn = 0, 0
    with contextlib.closing(_Reader(coded)) as reader:
        while True:
            work = pending[turn]
            if work is not None:
                work.result()
            n = reader.fill(ring[turn])
            if not n:
                break
            view = ring[turn][:n]
            if coded.pad is not None:
                coded.pad.fill(pad[:n], position)
                data = np.frombuffer(view, np.uint8)
                np.bitwise_xor(data, np.frombuffer(pad[:n], np.uint8), out=data)

            def keep(work: Future[None], turn: int = turn) -> None:
                pending[turn] = work

            yield view, keep
            position, turn = position + n, (turn + 1) % _RING
        for work in pending:
            if work is not None:
                work.result()


class _Reader:
    """The payload's data in order, decompressed where it is compressed."""

    def __init__(self, coded: Coded) -> None:
        self._coded = coded
        self._position = coded.start
        self._gzip = gzip.GzipFile(coded.payload.path) if coded.is_gzipped else None

    def fill(self, buffer: memoryview) -> int:
        """Read as much as `buffer` holds; fewer bytes only at the end."""
        if self._gzip is None:
            n = min(len(buffer), self._coded.payload.nbytes - self._position)
            self._coded.payload.fill(buffer[:n], self._position)
            self._position += n
            return n
        done = 0
        try:
            while done < len(buffer):
                n = self._gzip.readinto(buffer[done:])
                if not n:
                    break
                done += n
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{self._coded.label} is truncated or damaged: gzip: {error}", hint="download it again"
            ) from error
        return done

    def close(self) -> None:
        """Let go of the file."""
        if self._gzip is not None:
            self._gzip.close()
        self._coded.payload.close()


def _check_unpacked(path: Path, meter: _Meter) -> None:
    """Check sums of a file whose directory could not be read before it was written."""
    with path.open("rb") as file:
        head = file.read(4)
        if not head.startswith(b"PK") or not looks_like(head):
            return
        try:
            meter.zip = ZipSums(read_directory(file))
        except BROKEN_ZIP as error:
            raise InputError(f"{path.name} decodes to a damaged zip ({error})", hint="download it again") from error
        file.seek(0)
        while chunk := file.read(CHUNK_NBYTES):
            meter.zip.update(memoryview(chunk))


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
