"""The plan: every output spec, shard, byte offset, slice, the peak memory and a digest, before any data moves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.membership import decides_what_opens
from llmkit.errors import OutputError, SpecError
from llmkit.formats.container import Chunks, OutputFile, OutputFiles
from llmkit.pipeline.checks import check_structure
from llmkit.pipeline.target import Target
from llmkit.tensors.lazy import Node, Origin, Read, Rows, reads_below
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import TensorSpec
from llmkit.version import __version__

DEFAULT_MAX_SHARD_NBYTES = 5_000_000_000
# One slice of a step. Measured on a 1.1B fp16 addition (tests/bench/delta_apply.py): 1 MiB stays in the second-level
# cache from read to write and reuses warm heap; 4 MiB and more paid for fresh pages on every slice.
SLICE_NBYTES = 2**20


class Placement(NamedTuple):
    """Where one output tensor goes."""

    name: str
    spec: TensorSpec
    index: int  # type: ignore[assignment]  # of the output, and no method here
    file: str
    offset: int


class Step(NamedTuple):
    """One node with every output of it that is written, and the row slices it is computed in."""

    origin: Origin
    placements: tuple[Placement, ...]
    slices: tuple[Rows, ...]
    peak_nbytes: int

    @property
    def node(self) -> Node:
        """The node, made where it is not yet."""
        return self.origin.node

    @property
    def name(self) -> str:
        """The first tensor it writes."""
        return self.placements[0].name

    @property
    def write_nbytes(self) -> int:
        """Bytes it writes."""
        return sum(p.spec.nbytes for p in self.placements)


@dataclass(frozen=True)
class Plan:
    """All that a run will do. Making one reads no tensor data."""

    checkpoint: Checkpoint
    out: Path
    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]
    small_files: Mapping[str, bytes]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    links: Mapping[str, Path] = field(default_factory=dict)
    is_file: bool = False  # `out` is a file, not a folder

    @property
    def write_nbytes(self) -> int:
        """Bytes of all output files."""
        return sum(f.nbytes for f in self.files) + sum(map(len, self.small_files.values()))

    @property
    def step_nbytes(self) -> int:
        """Bytes that the steps write."""
        return sum(s.write_nbytes for s in self.steps)

    @property
    def linked_nbytes(self) -> int:
        """Bytes of the files that the output shares with its source."""
        return sum(path.stat().st_size for path in self.links.values())

    @property
    def copied_nbytes(self) -> int:
        """Bytes of linked files on another disk, which are copied."""
        disk = self.out.parent.stat().st_dev if self.out.parent.is_dir() else None
        return sum(stat.st_size for stat in (p.stat() for p in self.links.values()) if stat.st_dev != disk)

    @property
    def need_nbytes(self) -> int:
        """Bytes that the disk must have free: what is written, what is copied, and a little for the manifest."""
        return self.write_nbytes + self.copied_nbytes + 2**20

    @cached_property
    def _reads(self) -> list[Read]:
        return reads_below(s.origin for s in self.steps)

    @cached_property
    def read_nbytes(self) -> int:
        """Bytes of the input tensors, each counted once."""
        return sum([r.specs[0].nbytes for r in self._reads])

    @cached_property
    def sources(self) -> tuple[SourceFile, ...]:
        """The files that tensors are read from, as they were opened."""
        return tuple(dict.fromkeys([r.source for r in self._reads]))

    @cached_property
    def inputs(self) -> Mapping[Path, int]:
        """The files that tensors are read from, and their sizes in bytes."""
        return {s.path: s.nbytes for s in self.sources}

    def target(self, *, overwrite: bool = False, force: bool = False, inputs: Iterable[Path] = ()) -> Target:
        """Where it goes, with all that it is made from and `inputs` besides."""
        small = [content.path for content in self.checkpoint.files.values() if content.path is not None]
        used = (*self.inputs, *self.links.values(), *small, *inputs)
        return Target(self.out, overwrite, force, tuple(dict.fromkeys(used)), self.is_file)

    def peak_nbytes(self, workers: int) -> int:
        """Upper estimate of tensor memory in use with `workers` steps at a time."""
        return sum(sorted((s.peak_nbytes for s in self.steps), reverse=True)[:workers])

    @cached_property
    def digest(self) -> str:
        """Identifies the plan: expressions, input files' sizes and times, layout, slices, versions."""
        body: list[Any] = [__version__, [[f.name, f.nbytes, _hash_chunks(f.fixed)] for f in self.files]]
        slices: dict[int, str] = {}  # what steps of one form share is spelled once
        steps = xxh3_128()
        for origin, placements, rows, _ in self.steps:
            if id(rows) not in slices:
                slices[id(rows)] = hashlib.sha256(repr(rows).encode()).hexdigest()
            places = "\n".join([f"{p.index} {p.name} {p.file} {p.offset}" for p in placements])
            steps.update(f"{origin.fingerprint()}\n{places}\n{slices[id(rows)]}\n".encode())
        body.append(steps.hexdigest())
        body += [[name, hashlib.sha256(data).hexdigest()] for name, data in self.small_files.items()]
        body += [[name, SourceFile(path).fingerprint()] for name, path in self.links.items()]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """The plan as plain data, as `--dry-run --json` prints it."""
        return {
            "out": str(self.out),
            "recipe": [dict(h) for h in self.checkpoint.history],
            "tensors": sum(len(s.placements) for s in self.steps),
            "read_nbytes": self.read_nbytes,
            "write_nbytes": self.write_nbytes,
            "linked_nbytes": self.linked_nbytes,
            "copied_nbytes": self.copied_nbytes,
            "peak_nbytes": self.peak_nbytes(2),
            "files": {f.name: f.nbytes for f in self.files} | {k: len(v) for k, v in self.small_files.items()},
            "weight_files": [f.name for f in self.files],
            "links": {name: str(path) for name, path in self.links.items()},
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "digest": self.digest,
        }


def make_plan(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    max_shard_size: int = DEFAULT_MAX_SHARD_NBYTES,
    force: bool = False,
    slice_nbytes: int = SLICE_NBYTES,
) -> Plan:
    """Plan the writing of `checkpoint` as a folder of files, laid out by its container.

    Args:
        max_shard_size: a new file begins before a tensor that would make the current one larger (bytes).
        force: turn structural problems into warnings.
        slice_nbytes: what is computed at a time of a large tensor; the values written do not depend on it.

    Raises:
        SpecError: the tensors do not fit the config, there are none, or the container cannot hold them.
    """
    out = Path(out)
    layout = checkpoint.container.lay_out(checkpoint.specs, max_shard_size)
    is_file = _is_lone_file(checkpoint, layout, out)
    if not checkpoint.tensors and not layout.links:
        raise SpecError(f"{checkpoint.label}: nothing to write, it has no tensors")
    notes, warnings = check_structure(checkpoint, force=force)
    small: dict[str, bytes] = {}
    if checkpoint.config:
        small["config.json"] = _json(dict(checkpoint.config))
    small |= {name: content.read() for name, content in checkpoint.files.items()}
    checked = ((content.check, name) for name, content in checkpoint.files.items())
    findings = tuple(text for check, name in checked if check is not None and (text := check(small[name])) is not None)
    small |= layout.small_files
    if is_file:
        left = f": {', '.join(small)} do not go along; a folder as -o holds them, and a manifest" if small else ""
        file_name = layout.files[0].name
        checkpoint = replace(checkpoint, notes=tuple(n.replace(file_name, out.name) for n in checkpoint.notes))
        notes = (*notes, f"{out} is one file, without a manifest{left}")
        layout, small = replace(layout, files=(replace(layout.files[0], name=out.name),)), {}
    return Plan(
        checkpoint,
        out,
        layout.files,
        _steps(checkpoint, layout.files, slice_nbytes),
        small,
        checkpoint.notes + notes,
        checkpoint.warnings + warnings + findings,
        layout.links,
        is_file,
    )


def _is_lone_file(checkpoint: Checkpoint, layout: OutputFiles, out: Path) -> bool:
    """Whether `out` names the one file that a format such as GGUF consists of.

    Raises:
        OutputError: it is named like a file of weights, and a folder is to be written.
    """
    names = [f.name for f in layout.files]
    needs_more = (
        checkpoint.config or layout.links or layout.small_files or any(map(decides_what_opens, checkpoint.files))
    )
    if len(names) == 1 and not needs_more and Path(names[0]).suffix == out.suffix.lower():
        return True
    refuse_file_name(out)
    return False


def refuse_file_name(out: Path) -> None:
    """Refuse a folder that is named like a file of weights.

    Raises:
        OutputError: it is.
    """
    if decides_what_opens(out.name.lower()) and out.suffix not in ("", ".model") and not out.is_dir():
        raise OutputError(
            f"{out} is named like a file, and what is written is a folder: weights and the files that belong to them",
            hint=f"name a folder: -o {out.with_suffix('')}",
        )


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _hash_chunks(chunks: Chunks) -> str:
    hasher = hashlib.sha256()
    for offset, data in chunks:
        hasher.update(offset.to_bytes(8, "little") + data)
    return hasher.hexdigest()


def _steps(checkpoint: Checkpoint, files: Sequence[OutputFile], slice_nbytes: int) -> tuple[Step, ...]:
    grouped: dict[Origin, list[Placement]] = {}
    for file in files:
        for name, offset in file.offsets.items():
            lazy = checkpoint.tensors[name]
            grouped.setdefault(lazy.origin, []).append(Placement(name, lazy.spec, lazy.index, file.name, offset))
    steps = []
    costs: dict[object, tuple[tuple[Rows, ...], int]] = {}  # of each form: experts are alike
    for origin, placements in grouped.items():
        if (form := origin.form()) not in costs:
            slices = slice_rows(origin.sample, slice_nbytes)
            longest = max((stop - start for start, stop in slices), default=0)
            costs[form] = slices, origin.sample.peak_nbytes(longest)
        steps.append(Step(origin, tuple(placements), *costs[form]))
    return tuple(steps)


def slice_rows(node: Node, slice_nbytes: int) -> tuple[Rows, ...]:
    """The row slices of a node: multiples of its row step, near `slice_nbytes` of the wider of inputs and outputs."""
    n = node.n_rows
    if node.row_step is None or n <= node.row_step:
        return ((0, n),)
    sliced_inputs = [i.spec.nbytes for i in node.widest_inputs() if i.spec.n_rows == n]
    widest = max([node.slice_nbytes(n), *sliced_inputs])
    rows = max(slice_nbytes * n // max(widest, 1) // node.row_step * node.row_step, node.row_step)
    return tuple((start, min(start + rows, n)) for start in range(0, n, rows)) or ((0, 0),)
