"""Decode a release: several files at a time, in chunks, hashed as they are written; final only when all are right."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import new_manifest
from llmkit.errors import InputError
from llmkit.formats.torch_pickle import looks_like
from llmkit.lazy_imports import np
from llmkit.pipeline.commit import Partial
from llmkit.pipeline.hashing import hash_range, new_hasher
from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.pipeline.steps import StepRunner, Work, write_output
from llmkit.pipeline.target import Target
from llmkit.releases.decoding import Decoding, check_samples, check_whole
from llmkit.releases.hash_list import Expected
from llmkit.releases.streams import Coded
from llmkit.releases.zip_sums import BROKEN_ZIP, Entry, ZipSums, read_directory
from llmkit.tensors.source import SourceFile

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
    sums: dict[str, list[Entry]] = {}

    def write(partial: Partial) -> dict[str, Any]:
        run = _Decoder(decoding, partial, sums, expect or {}, progress)
        largest_first = sorted(decoding.files, key=lambda c: -c.payload.nbytes)
        with run.writer:
            run.run(largest_first, ThreadPoolExecutor(workers or default_workers()))
        check_whole(decoding, partial.path)
        manifest = new_manifest(
            recipe=[decoding.step],
            notes=decoding.notes,
            warnings=() if expect or is_confirmed else decoding.judge(partial.path),
            inputs=[{"path": p, "nbytes": n, "tensors": {}} for p, n in decoding.inputs.items()],
            files={name: entry["file"] for name, entry in sorted(run.entries.items())},
        )
        return manifest | {"run": run.resumed()}

    work = Work(decoding.digest, decoding.need_nbytes, decoding.sources, len(decoding.files), decoding.write_nbytes)
    return write_output(
        work, target, write, label=f"decoding {target.out.name}", resume=resume, progress=progress,
        check=lambda: sums.update(check_samples(decoding, progress)),
    )  # fmt: skip


class _Decoder(StepRunner[Coded]):
    def __init__(
        self,
        decoding: Decoding,
        partial: Partial,
        sums: Mapping[str, list[Entry]],
        expect: Mapping[str, Expected],
        progress: Progress,
    ) -> None:
        super().__init__(partial, progress)
        self.decoding = decoding
        self.sums = sums
        self.expect = expect

    def perform(self, step: Coded) -> dict[str, Any] | None:
        """Decode a file, and compare it with what is known of it."""
        meter = _Meter(self._algorithms(step), self.sums[step.name])
        self.writer.open(step.name, step.nbytes or 0)
        with ThreadPoolExecutor(1) as hasher:
            position = 0
            for view, chunk_done in _decoded_chunks(step):
                if self.stop.is_set():
                    return None
                chunk_done(hasher.submit(meter.update, view))
                self.writer.write(step.name, view, position)
                position += len(view)
                self.progress.advance(len(view), step.name)
        self.writer.finish(step.name)
        self._check(step, meter, self.partial.path / step.name)
        return {"file": {"nbytes": position, **meter.digests()}}

    def written_nbytes(self, step: Coded, entry: dict[str, Any]) -> int | None:
        """The bytes of a file that still has the hash that was noted, and the one that it is expected to have."""
        noted, stated = entry.get("file", {}), self.expect.get(step.name)
        path = self.partial.path / step.name
        if not path.is_file() or path.stat().st_size != noted.get("nbytes"):
            return None
        if stated is not None and noted.get(stated.algorithm) != stated.digest:
            return None
        source = SourceFile(path)
        return source.nbytes if hash_range(source, 0, source.nbytes) == noted.get("xxh3") else None

    def _algorithms(self, coded: Coded) -> list[str]:
        stated = self.expect.get(coded.name)
        wanted = ["xxh3", "sha256" if coded.sha256 else "", stated.algorithm if stated else ""]
        return [a for a in dict.fromkeys(wanted) if a]

    def _check(self, coded: Coded, meter: _Meter, path: Path) -> None:
        """The decoded file against what is known of it."""
        digests = meter.digests()
        if coded.sha256 is not None and digests["sha256"] != coded.sha256:
            raise self.decoding.failure(
                f"{coded.label} decodes to sha256 {digests['sha256'][:16]}…, it says {coded.sha256[:16]}…: "
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
        if stated is not None and digests[stated.algorithm] != stated.digest:
            raise self.decoding.failure(
                f"{coded.label} decodes to {stated.algorithm} {digests[stated.algorithm]}, expected {stated.digest}: "
                f"{self.decoding.culprit}, or the file is damaged"
            )


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


def _decoded_chunks(coded: Coded) -> Iterator[tuple[memoryview, Callable[[Future[None]], None]]]:
    """The decoded file in chunks, each with a function that takes the work to end before its memory is reused."""
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
        """Close the file."""
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
