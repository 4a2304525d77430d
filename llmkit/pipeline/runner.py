"""The runner: evaluates a plan step by step in several threads, writes each tensor at its offset, hashes as it goes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xxhash import xxh3_128

from llmkit.checkpoint.manifest import MANIFEST_FORMAT, frame_hash, versions
from llmkit.errors import SpecError
from llmkit.formats.container import OutputFile
from llmkit.pipeline.commit import Partial, finish_earlier, sync_data
from llmkit.pipeline.hashing import Hasher, ReadHash, hash_of, observe_read
from llmkit.pipeline.headstart import HeadStart, find_stretches, moved_tensor
from llmkit.pipeline.plan import Placement, Plan, Step
from llmkit.pipeline.pool import default_workers, run_all
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.pipeline.sharing import SharedFiles
from llmkit.pipeline.target import disk_errors
from llmkit.tensors.finite import count_not_finite
from llmkit.tensors.lazy import Context, Read, Rows
from llmkit.tensors.loading import import_torch
from llmkit.tensors.moving import Mover, is_moved
from llmkit.tensors.nodes import NodeTable
from llmkit.tensors.source import bytes_of
from llmkit.tensors.stopped import Stopped

if TYPE_CHECKING:
    import torch

__all__ = ["WriteObserver", "run_plan"]

COPY_NBYTES = 2**20  # of a tensor that only moves: read, hashed and written while it is in the second-level cache


class WriteObserver(Protocol):
    """Sees what is written: rows from `start` of tensor `name`."""

    def __call__(self, name: str, start: int, data: torch.Tensor) -> None:
        """`data` is about to be written."""


def run_plan(
    plan: Plan,
    *,
    overwrite: bool = False,
    force: bool = False,
    inputs: Iterable[Path] = (),
    resume: bool = True,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
    observe: WriteObserver | None = None,
    findings: Callable[[], Mapping[str, Any]] | None = None,
    hash_links: bool = True,
) -> dict[str, Any]:
    """Write what the plan says and return the manifest.

    Args:
        overwrite: replace an existing checkpoint folder, once the new one is whole.
        force: with `overwrite`, replace any other folder, too.
        inputs: what the plan was made from besides the files that it reads itself; none of it is ever replaced.
        resume: continue an interrupted run of the same plan.
        workers: steps in flight at a time; the bytes written do not depend on it.
        observe: sees every slice that is computed (not what an earlier run wrote), from several threads.
        findings: what was counted while the data passed; goes into the manifest's entry "run".
        hash_links: read files that are shared with the source once, so that `verify` can tell when they change; else
            only their size and time are noted (small ones are hashed anyway).

    Raises:
        OutputError: the output exists or cannot be written.
        InputError: an input changed or ended while it was read.
        SpecError: a computed tensor is not what the plan promised.
    """
    target = plan.target(overwrite=overwrite, force=force, inputs=inputs)
    if (finished := finish_earlier(target, plan.digest)) is not None:
        return _resumed_whole(plan, finished)
    target.check(plan.need_nbytes)
    started = time.monotonic()
    shared = SharedFiles(plan.links, hash_all=hash_links, progress=progress)
    label = f"writing {plan.out.name}" if plan.steps else "hashing"  # a linked export reads, and writes next to nothing
    progress.begin(sum(s.write_nbytes for s in plan.steps) + shared.nbytes, label, "B")
    try:
        with shared, Partial(target, plan.digest, resume=resume) as partial:
            if partial.finished is not None:
                partial.commit()
                return _resumed_whole(plan, partial.finished)
            run = _Run(plan, partial, progress, observe)
            run.execute(workers or default_workers())
            partial.clear_workspace()
            manifest = _manifest(plan, run)
            for name, data in plan.small_files.items():
                partial.write_file(name, data)
            for name, source in plan.links.items():
                manifest["files"][name] = shared.entry(name, partial.link(name, source))
            manifest["run"] = {"elapsed_s": round(time.monotonic() - started, 3), "steps_resumed": run.n_resumed}
            manifest["run"] |= {"nbytes_resumed": run.nbytes_resumed} | dict(findings() if findings is not None else {})
            manifest["run"] |= {"not_finite": dict(sorted(run.not_finite.items()))} if run.not_finite else {}
            partial.finish(manifest, plan.sources)
    finally:
        progress.end()
    return manifest


def _resumed_whole(plan: Plan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a run that had written all before it was killed."""
    resumed = {"steps_resumed": len(plan.steps), "nbytes_resumed": sum(s.write_nbytes for s in plan.steps)}
    return {**manifest, "run": {**manifest["run"], **resumed}}


class _Run:
    def __init__(self, plan: Plan, partial: Partial, progress: Progress, observe: WriteObserver | None) -> None:
        self.observe = observe
        self.plan = plan
        self.partial = partial
        self.progress = progress
        self.hashes: dict[str, str] = {}
        self.frames: dict[str, str] = {}
        self._crcs: dict[str, int] = {}
        self._with_crc = {f.name for f in plan.files if f.finish is not None}
        self.read_hashes: dict[str, dict[str, str]] = {}
        self.not_finite: dict[str, int] = {}
        self.n_resumed = 0
        self.nbytes_resumed = 0
        self._stop = threading.Event()
        self._computed = threading.Event()
        self._guard = threading.Lock()
        self._writing = threading.Lock()
        self._fds: dict[str, int] = {}
        self._moved = HeadStart([], self._fds)

    def execute(self, workers: int) -> None:
        flusher = threading.Thread(target=self._flush_early, daemon=True)
        threads = None
        try:
            for file in self.plan.files:
                self._fds[file.name] = self.partial.open_file(file.name, file.nbytes)
            flusher.start()
            if self.observe is None and all(is_moved(step.node) for step in self.plan.steps):
                run_all(ThreadPoolExecutor(workers), self._move_step, self.plan.steps, self._stop)
            else:
                self._import_torch()
                import torch

                threads = torch.get_num_threads()
                pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
                run_all(pool, self._run_step, self.plan.steps, self._stop)
            for file in self.plan.files:
                with disk_errors(self.partial.path / file.name):
                    self._write_frame(file)
                    os.fsync(self._fds[file.name])
        finally:
            self._computed.set()
            if flusher.ident is not None:
                flusher.join()
            if threads is not None:
                torch.set_num_threads(threads)
            for name, fd in self._fds.items():
                self.partial.close_file(name, fd)

    def _write_frame(self, file: OutputFile) -> None:
        """Write what is no tensor: headers, and what the container adds when the data is known."""
        chunks = [*file.fixed, *(file.finish(self._crcs) if file.finish is not None else ())]
        for offset, data in chunks:
            _pwrite(self._fds[file.name], memoryview(data), offset)
        spans = [(o, self.plan.checkpoint.tensors[t].spec.nbytes) for t, o in file.offsets.items()]
        self.frames[file.name] = frame_hash(self._fds[file.name], spans, file.nbytes)

    def _import_torch(self) -> None:
        """Import torch, and copy meanwhile what only moves (in a fresh run: a resumed one has tensors in place)."""
        is_late = "torch" in sys.modules or self.partial.has_records or self.observe is not None
        self._moved = HeadStart([] if is_late else find_stretches(self.plan), self._fds)
        self._moved.begin()
        try:
            import_torch()
        finally:
            self._moved.end()

    def _flush_early(self) -> None:
        """Send written pages to the disk while others are computed, so that the last fsync finds little to do."""
        while not self._computed.wait(0.25):
            for fd in self._fds.values():
                with contextlib.suppress(OSError):  # the fsync at the end reports it
                    sync_data(fd)

    def _run_step(self, step: Step) -> None:
        import torch

        if self._stop.is_set() or self._resumed(step) or self._is_moved(step):
            return
        hashers = {p.name: Hasher(p.file in self._with_crc) for p in step.placements}
        reads: dict[int, ReadHash] = {}
        not_finite: Counter[str] = Counter()
        is_computed = not is_moved(step.node)
        context = Context(lambda node, rows, data: observe_read(reads, node, rows, bytes_of(data)), self._stop.is_set)
        context.report = lambda text: self.progress.advance(0, text)
        context.workspace = self.partial.workspace
        with torch.inference_mode():
            for rows in step.slices:
                if self._stop.is_set():
                    return
                context.next_slice()
                try:
                    results = step.node.evaluate(rows, context)
                except Stopped:
                    return
                for placement in step.placements:
                    self._write(step, placement, rows, results[placement.index], hashers[placement.name])
                    if is_computed:
                        not_finite[placement.name] += count_not_finite(results[placement.index])
        self._finish_step(step, hashers, ((r.node, r.digest) for r in reads.values()), +not_finite)

    def _move_step(self, step: Step) -> None:
        """A step that only moves bytes, without torch."""
        if self._stop.is_set() or self._resumed(step):
            return
        node = moved_tensor(step)
        if node is not None:
            self._copy_step(step, node)
            return
        hashers = {p.name: Hasher(p.file in self._with_crc) for p in step.placements}
        reads: dict[int, ReadHash] = {}
        mover = Mover(lambda node, rows, data: observe_read(reads, node, rows, data))
        for rows in step.slices:
            if self._stop.is_set():
                return
            results = mover.evaluate(step.node, rows)
            for placement in step.placements:
                start, _ = step.node.output_rows(placement.index, rows)
                offset = placement.offset + start * placement.spec.row_nbytes
                self._write_bytes(placement, offset, results[placement.index], hashers[placement.name])
        self._finish_step(step, hashers, ((r.node, r.digest) for r in reads.values()))

    def _copy_step(self, step: Step, node: Read) -> None:
        """A step whose output is a stored tensor as it is: one buffer, and one hash for what is read and written."""
        placement = step.placements[0]
        hasher = Hasher(placement.file in self._with_crc)
        buffer = memoryview(bytearray(min(step.write_nbytes, COPY_NBYTES)))
        for start in range(0, step.write_nbytes, COPY_NBYTES):
            if self._stop.is_set():
                return
            view = buffer[: min(COPY_NBYTES, step.write_nbytes - start)]
            node.source.fill(view, node.offset + start)
            self._write_bytes(placement, placement.offset + start, view, hasher)
        self._finish_step(step, {step.name: hasher}, [(node, hasher.hexdigest())])

    def _finish_step(
        self,
        step: Step,
        hashers: Mapping[str, Hasher],
        reads: Iterable[tuple[Read, str | None]],
        not_finite: Mapping[str, int] | None = None,
    ) -> None:
        """Note the hashes of what was written, and of the stored tensors that it was made from."""
        entry = {
            "tensors": {name: h.hexdigest() for name, h in hashers.items()},
            "crc32": {name: h.crc for name, h in hashers.items() if h.crc is not None},
            "reads": [[str(node.source.path), node.name, digest] for node, digest in reads if digest is not None],
            "not_finite": dict(not_finite or {}),
        }
        self.partial.record(step.name, entry)
        self._keep(entry)

    def _write(self, step: Step, placement: Placement, rows: Rows, data: torch.Tensor, hasher: Hasher) -> None:
        start, stop = step.node.output_rows(placement.index, rows)
        if start == stop and placement.spec.shape:
            return
        spec = placement.spec if not placement.spec.shape else placement.spec.with_rows(stop - start)
        if tuple(data.shape) != spec.shape or data.dtype != spec.dtype.torch:
            raise SpecError(
                f"{placement.name}: computed {tuple(data.shape)} {data.dtype}, the plan says {spec}: "
                f"a bug in {step.node.op!r}"
            )
        if self.observe is not None:
            self.observe(placement.name, start, data)
        self._write_bytes(placement, placement.offset + start * placement.spec.row_nbytes, bytes_of(data), hasher)

    def _write_bytes(self, placement: Placement, offset: int, view: memoryview, hasher: Hasher) -> None:
        """Write bytes of a tensor at an offset of its file."""
        hasher.update(view)
        # One writer at a time: the kernel locks the file anyway, and spinning for it took longer than the writing.
        with self._writing, disk_errors(self.partial.path / placement.file):
            _pwrite(self._fds[placement.file], view, offset)
        self.progress.advance(len(view), placement.name)

    def _resumed(self, step: Step) -> bool:
        """Whether an earlier run wrote this step and the bytes on disk still have the hashes it noted."""
        entry = self.partial.done.get(step.name)
        if entry is None:
            return False
        for placement in step.placements:
            found = self._hash_written(placement)
            if found is None or found.hexdigest() != entry.get("tensors", {}).get(placement.name):
                return False
        self._keep(entry)
        with self._guard:
            self.n_resumed += 1
            self.nbytes_resumed += step.write_nbytes
        self.progress.advance(step.write_nbytes, step.name)
        return True

    def _is_moved(self, step: Step) -> bool:
        """Whether the head start has copied this step, and the bytes that arrived are those of the input."""
        node = moved_tensor(step)
        if node is None or not self._moved.has_moved(step):
            return False
        written = self._hash_written(step.placements[0])
        read = hash_of(node.source.fileno(), node.offset, step.write_nbytes)
        if written is None or read is None or written.hexdigest() != read.hexdigest():
            return False
        self._finish_step(step, {step.name: written}, [(node, written.hexdigest())])
        self.progress.advance(step.write_nbytes, step.name)
        return True

    def _hash_written(self, placement: Placement) -> Hasher | None:
        with_crc = placement.file in self._with_crc
        with disk_errors(self.partial.path / placement.file):
            return hash_of(self._fds[placement.file], placement.offset, placement.spec.nbytes, with_crc)

    def _keep(self, entry: Mapping[str, Any]) -> None:
        with self._guard:
            self.hashes.update(entry["tensors"])
            self._crcs.update(entry["crc32"])
            self.not_finite.update(entry.get("not_finite", {}))
            for path, name, digest in entry["reads"]:
                self.read_hashes.setdefault(path, {})[name] = digest


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def _manifest(plan: Plan, run: _Run) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    tensors = {}
    stored = {name: inner for f in plan.files for name, inner in f.stored.items()}
    table = NodeTable()
    for step in plan.steps:
        for p in step.placements:
            tensors[p.name] = {
                "file": p.file, "dtype": p.spec.dtype.name, "shape": list(p.spec.shape),
                "offset": p.offset, "xxh3": run.hashes[p.name], "from": table.add(checkpoint.tensors[p.name]),
            }  # fmt: skip
            if p.name in stored:
                tensors[p.name]["stored_as"] = stored[p.name]
    return {
        "format": MANIFEST_FORMAT,
        "versions": versions(),
        "recipe": [dict(h) for h in checkpoint.history],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "inputs": [{"path": p, "nbytes": n, "tensors": dict(sorted(run.read_hashes.get(p, {}).items()))}
                   for p, n in sorted((str(path), n) for path, n in plan.inputs.items())],
        "files": {f.name: {"nbytes": f.nbytes, "header": run.frames[f.name]} for f in plan.files}
        | {name: {"nbytes": len(data), "xxh3": xxh3_128(data).hexdigest()}
           for name, data in plan.small_files.items()},
        "tensors": dict(sorted(tensors.items())),
        "nodes": table.nodes,
    }  # fmt: skip
