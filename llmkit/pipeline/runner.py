"""The runner: evaluates a plan step by step in several threads, writes each tensor at its offset, hashes as it goes."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128

from llmkit.checkpoint.manifest import frame_hash, new_manifest
from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.pipeline.commit import Partial
from llmkit.pipeline.hashing import Hasher, ReadHash, feed, hash_range, observe_read
from llmkit.pipeline.headstart import HeadStart, copied_tensor, find_stretches
from llmkit.pipeline.plan import Plan, Step
from llmkit.pipeline.pool import default_workers, one_thread_each
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.pipeline.sharing import SharedFiles
from llmkit.pipeline.steps import Entry, StepRunner, Work, write_output
from llmkit.pipeline.target import disk_errors
from llmkit.tensors.finite import count_not_finite
from llmkit.tensors.lazy import Bytes, Context, Read, Rows
from llmkit.tensors.loading import import_torch
from llmkit.tensors.nodes import NodeTable
from llmkit.tensors.source import bytes_of


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
    shared = SharedFiles(plan.links, hash_all=hash_links, progress=progress)

    def write(partial: Partial) -> dict[str, Any]:
        run = _Runner(plan, partial, progress, observe)
        with shared:
            run.execute(workers or default_workers())
            partial.clear_workspace()
            manifest = _manifest(plan, run)
            for name, data in plan.small_files.items():
                partial.write_file(name, data)
            for name, source in plan.links.items():
                manifest["files"][name] = shared.entry(name, partial.link(name, source))
        not_finite = run.noted("not_finite")
        manifest["run"] = run.resumed() | dict(findings() if findings is not None else {})
        manifest["run"] |= {"not_finite": dict(sorted(not_finite.items()))} if not_finite else {}
        return manifest

    # A linked export reads, and writes next to nothing.
    label = f"writing {plan.out.name}" if plan.steps else "hashing"
    work = Work(plan.digest, plan.need_nbytes, plan.sources, len(plan.steps), plan.step_nbytes)
    return write_output(work, target, write, label=label, more_nbytes=shared.nbytes, resume=resume, progress=progress)


class _Runner(StepRunner[Step]):
    def __init__(self, plan: Plan, partial: Partial, progress: Progress, observe: WriteObserver | None) -> None:
        super().__init__(partial, progress)
        self.plan = plan
        self.observe = observe
        self.frames: dict[str, str] = {}
        self._with_crc = {f.name for f in plan.files if f.finish is not None}
        self._head_start = HeadStart([], self.writer.descriptors)

    def execute(self, workers: int) -> None:
        """Write all files of the plan."""
        needs_torch = self.observe is not None or not all(step.node.is_moved for step in self.plan.steps)
        with self.writer:
            for file in self.plan.files:
                self.writer.open(file.name, file.nbytes)
            if needs_torch:
                self._import_torch()
            with one_thread_each(workers) if needs_torch else ThreadPoolExecutor(workers) as pool:
                self.run(self.plan.steps, pool)
            crcs = self.noted("crc32")
            for file in self.plan.files:
                # What is no tensor: headers, and what the container adds when the data is known.
                for offset, data in (*file.fixed, *(file.finish(crcs) if file.finish is not None else ())):
                    self.writer.write(file.name, memoryview(data), offset)
                spans = [(o, self.plan.checkpoint.tensors[t].spec.nbytes) for t, o in file.offsets.items()]
                with disk_errors(self.partial.path / file.name):
                    self.frames[file.name] = frame_hash(self.writer.descriptors[file.name], spans, file.nbytes)
                self.writer.finish(file.name)

    def noted(self, key: str) -> dict[str, Any]:
        """What the entries of all steps have under `key`, by the name of the tensor."""
        return {name: value for entry in self.entries.values() for name, value in entry.get(key, {}).items()}

    def _import_torch(self) -> None:
        """Import torch, and copy meanwhile what only moves (in a fresh run: a resumed one has tensors in place)."""
        if "torch" not in sys.modules and not self.partial.has_records and self.observe is None:
            self._head_start = HeadStart(find_stretches(self.plan.steps), self.writer.descriptors)
        with self._head_start:
            import_torch()

    def perform(self, step: Step) -> Entry | None:
        """Take a step from the head start, or compute it slice by slice; both give one entry."""
        if (entry := self._head_started(step)) is not None:
            return entry
        hashers = {p.name: Hasher(p.file in self._with_crc) for p in step.placements}
        reads: dict[int, ReadHash] = {}
        not_finite: Counter[str] = Counter()
        copied = copied_tensor(step)  # what is read is what is written: hashed once
        context = Context(functools.partial(observe_read, reads) if copied is None else None)
        context.report = lambda text: self.progress.advance(0, text)
        context.workspace = self.partial.workspace
        for rows in step.slices:
            if self.stop.is_set():
                return None
            context.next_slice()
            pieces = self._evaluate(step, rows, context, not_finite)
            for placement in step.placements:
                if view := memoryview(pieces[placement.index]):
                    start, _ = step.node.output_rows(placement.index, rows)
                    hashers[placement.name].update(view)
                    offset = placement.offset + start * placement.spec.row_nbytes
                    self.writer.write(placement.file, view, offset)
                    self.progress.advance(len(view), placement.name)
        digests = [(r.node, r.digest) for r in reads.values()]
        if copied is not None:
            digests.append((copied, hashers[step.name].hexdigest()))
        return _entry(hashers, digests, +not_finite)

    def _evaluate(self, step: Step, rows: Rows, context: Context, not_finite: Counter[str]) -> Sequence[Bytes]:
        """The bytes of each output for rows of a step: moved without torch, or computed, checked and counted."""
        node = step.node
        if node.is_moved and self.observe is None:
            return node.move(rows, context)
        with torch.inference_mode():
            results = node.evaluate(rows, context)
            pieces = [memoryview(b"")] * len(results)
            for placement in step.placements:
                data, span = results[placement.index], node.output_rows(placement.index, rows)
                if span[0] == span[1] and placement.spec.shape:
                    continue
                spec = placement.spec.of_rows(span)
                if tuple(data.shape) != spec.shape or data.dtype != spec.dtype.torch:
                    raise SpecError(
                        f"{placement.name}: computed {tuple(data.shape)} {data.dtype}, the plan says {spec}: "
                        f"a bug in {node.op!r}"
                    )
                if self.observe is not None:
                    self.observe(placement.name, span[0], data)
                if not node.is_moved:
                    not_finite[placement.name] += count_not_finite(data)
                pieces[placement.index] = bytes_of(data)
        return pieces

    def _head_started(self, step: Step) -> Entry | None:
        """The entry of a step that the head start has copied; None where other bytes arrived than the input has."""
        node = copied_tensor(step)
        if node is None or not self._head_start.has_copied(step):
            return None
        hasher = Hasher(any(p.file in self._with_crc for p in step.placements))
        feed(hasher, node.source, node.offset, node.specs[0].nbytes)
        entry = _entry({p.name: hasher for p in step.placements}, [(node, hasher.hexdigest())], {})
        nbytes = self.written_nbytes(step, entry)
        if nbytes is None:
            return None
        self.progress.advance(nbytes, step.name)
        return entry

    def written_nbytes(self, step: Step, entry: Entry) -> int | None:
        """The bytes of a step, where those on the disk have the hashes in `entry`."""
        for p in step.placements:
            if hash_range(self.writer.source(p.file), p.offset, p.spec.nbytes) != entry.get("tensors", {}).get(p.name):
                return None
        return step.write_nbytes


def _entry(
    hashers: Mapping[str, Hasher], reads: Iterable[tuple[Read, str | None]], not_finite: Mapping[str, int]
) -> Entry:
    """The hashes of what was written, and of the stored tensors that it was made from."""
    return {
        "tensors": {name: h.hexdigest() for name, h in hashers.items()},
        "crc32": {name: h.crc for name, h in hashers.items() if h.crc is not None},
        "reads": [[str(node.source.path), node.name, digest] for node, digest in reads if digest is not None],
        "not_finite": dict(not_finite),
    }


def _manifest(plan: Plan, run: _Runner) -> dict[str, Any]:
    tensors, hashes = {}, run.noted("tensors")
    stored = {name: inner for f in plan.files for name, inner in f.stored.items()}
    table = NodeTable()
    for step in plan.steps:
        for p in step.placements:
            tensors[p.name] = {
                "file": p.file, "dtype": p.spec.dtype.name, "shape": list(p.spec.shape),
                "offset": p.offset, "xxh3": hashes[p.name], "from": table.add(plan.checkpoint.tensors[p.name]),
            }  # fmt: skip
            if p.name in stored:
                tensors[p.name]["stored_as"] = stored[p.name]
    reads: dict[str, dict[str, str]] = {}
    for path, name, digest in (read for entry in run.entries.values() for read in entry["reads"]):
        reads.setdefault(path, {})[name] = digest
    inputs = sorted((str(path), n) for path, n in plan.inputs.items())
    small = {name: {"nbytes": len(data), "xxh3": xxh3_128(data).hexdigest()} for name, data in plan.small_files.items()}
    return new_manifest(
        recipe=plan.checkpoint.history,
        notes=plan.notes,
        warnings=plan.warnings,
        inputs=[{"path": p, "nbytes": n, "tensors": dict(sorted(reads.get(p, {}).items()))} for p, n in inputs],
        files={f.name: {"nbytes": f.nbytes, "header": run.frames[f.name]} for f in plan.files} | small,
        tensors=dict(sorted(tensors.items())),
        nodes=table.nodes,
    )
