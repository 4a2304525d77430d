"""Is a folder still what llmkit wrote? Sizes, hashes, names, index, and whether the parts fit together."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.manifest import MANIFEST_NAME, examine_manifest, frame_hash, is_sealed
from llmkit.checkpoint.membership import decides_what_opens
from llmkit.errors import InputError, LlmkitError, listing
from llmkit.formats import safetensors
from llmkit.formats.folder import is_weight_file
from llmkit.inspection.summary import summarize
from llmkit.pipeline.commit import JOURNAL
from llmkit.pipeline.hashing import hash_range
from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.tensors.lazy import Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec


@dataclass(frozen=True)
class Verdict:
    """What the check of an output folder found.

    Attributes:
        problems: what differs from the manifest or does not fit, in words.
        notes: what is odd and no fault: files that llmkit did not write.
        n_files, n_tensors: what was compared.
        nbytes: bytes that were hashed.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    n_files: int
    n_tensors: int
    nbytes: int

    @property
    def is_ok(self) -> bool:
        """True when nothing differs."""
        return not self.problems


def check_output(folder: Path, *, workers: int | None = None, progress: Progress = NO_PROGRESS) -> Verdict:
    """Compare a folder with its manifest, and its parts with one another. Reads every byte once.

    Raises:
        InputError: it has no manifest.
    """
    manifest, damage = examine_manifest(folder)
    if damage is not None:
        return Verdict((damage,), (), 0, 0, 0)
    problems: list[str] = []
    notes: list[str] = []
    is_whole = is_sealed(manifest)
    if is_whole is None:
        notes.append(f"{MANIFEST_NAME} holds no hash of itself: an older llmkit wrote it")
    elif not is_whole:
        problems.append(f"{MANIFEST_NAME} was changed: what it says of inputs, recipe and files has another hash")
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    sound = [name for name in files if _has_size(folder, name, files[name], problems)]
    weights = {n: SourceFile(folder / n) for n in sound if "header" in files[n]}
    for name in (n for n in sound if n not in weights and "linked" not in files[n]):
        source = SourceFile(folder / name)
        if hash_range(source, 0, source.nbytes, "xxh3") != files[name]["xxh3"]:
            problems.append(f"{name} was changed: its content has another hash than in {MANIFEST_NAME}")
    stored = _stored(manifest["tensors"], weights, problems)
    for name, source in weights.items():
        spans = [(s.start, s.nbytes) for s in stored.values() if s.source is source]
        if frame_hash(source.fileno(), spans, source.nbytes) != files[name]["header"]:
            problems.append(f"{name}: its header was changed")
    nbytes = _check_tensors(manifest["tensors"], stored, problems, workers, progress)
    nbytes += _check_linked(folder, {n: files[n] for n in sound if "linked" in files[n]}, problems, notes, progress)
    nbytes += sum(int(files[n]["nbytes"]) for n in sound if not files[n].keys() & {"header", "linked"})
    if manifest["tensors"] or "config.json" in files:  # a decoded release may be files for another program
        problems += _fit(folder)
    for name in sorted(p.name for p in folder.iterdir() if p.name not in files and p.name != MANIFEST_NAME):
        if is_weight_file(name):
            problems.append(f"{name} holds weights that llmkit did not write")
        elif decides_what_opens(name):
            problems.append(f"{name} was added later: it changes what the folder opens as, or what programs read of it")
        elif name == JOURNAL:
            notes.append("written by a run that was killed when all was whole; the same command removes its journal")
        else:
            notes.append(f"{name} was added later")
    return Verdict(tuple(problems), tuple(notes), len(files), len(manifest["tensors"]), nbytes)


def _has_size(folder: Path, name: str, entry: Mapping[str, Any], problems: list[str]) -> bool:
    path = folder / name
    if Path(name).name != name:
        problems.append(f"{MANIFEST_NAME} names {name!r}, which is outside the folder")
        return False
    if not path.is_file():
        problems.append(f"{name} is missing")
        return False
    size = path.stat().st_size
    if size != entry["nbytes"]:
        problems.append(f"{name} is {size} bytes long, expected {entry['nbytes']}")
        return False
    return True


def _check_linked(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], problems: list[str], notes: list[str], progress: Progress
) -> int:
    """Check files shared with the source, which change when a hard link is written to. Returns the bytes hashed."""
    sources = {name: SourceFile(folder / name) for name, entry in entries.items() if "xxh3" in entry}
    ranges = {name: _Stored(source, 0, source.nbytes) for name, source in sources.items()}
    total = sum(stored.nbytes for stored in ranges.values())
    if ranges:
        progress.begin(total, "hashing", "B")
    try:
        with ThreadPoolExecutor(2) as pool:
            digests = pool.map(lambda name: _hash(ranges[name], name, progress), ranges)
            digest_of = dict(zip(ranges, digests, strict=True))
    finally:
        progress.end()
    for name, entry in entries.items():
        where = f"{name} (shared with {entry['linked']})"
        if name in digest_of:
            if digest_of[name] != entry["xxh3"]:
                problems.append(f"{where} was changed: its content has another hash than in {MANIFEST_NAME}")
        elif "mtime_ns" not in entry:
            notes.append(f"{where} was not hashed: only its size is known")
        elif (folder / name).stat().st_mtime_ns != entry["mtime_ns"]:
            problems.append(f"{where} may have been changed: its time is not that of the export, which hashed nothing")
        else:
            notes.append(f"{where} was not hashed (--no-check): size and time are those of the export")
    return total


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of a tensor should be."""

    source: SourceFile
    start: int
    nbytes: int


def _stored(
    tensors: Mapping[str, Mapping[str, Any]], weights: Mapping[str, SourceFile], problems: list[str]
) -> dict[str, _Stored]:
    """The place of each tensor in the files that are there. Any format: the manifest says where the data lies."""
    early = {e["file"] for e in tensors.values() if "offset" not in e}  # llmkit 0.1.0 wrote safetensors, and no offsets
    read = {n: node.offset for f in early if f in weights for n, node in _reads(weights[f].path).items()}
    stored: dict[str, _Stored] = {}
    for name, entry in tensors.items():
        source = weights.get(entry["file"])
        if source is None:
            continue
        start, nbytes = (
            entry.get("offset", read.get(name, source.nbytes)),
            TensorSpec(DType[entry["dtype"]], tuple(entry["shape"])).nbytes,
        )
        if start + nbytes > source.nbytes:
            problems.append(f"{name}: {MANIFEST_NAME} puts it beyond the end of {entry['file']}")
        else:
            stored[name] = _Stored(source, start, nbytes)
    missing = [n for n in tensors if n not in stored]
    if missing:
        problems.append(f"{len(missing)} tensors of {MANIFEST_NAME} are in no readable file: {listing(missing)}")
    return stored


def _reads(path: Path) -> dict[str, Read]:
    try:
        return {n: t.node for n, t in safetensors.read(path)[0].items() if isinstance(t.node, Read)}
    except InputError:
        return {}


def _check_tensors(
    expected: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, _Stored],
    problems: list[str],
    workers: int | None,
    progress: Progress,
) -> int:
    """Hash every tensor in its place; the bytes hashed."""
    total = sum(s.nbytes for s in stored.values())
    progress.begin(total, "hashing", "B")

    def one(name: str) -> bool:
        return _hash(stored[name], name, progress) == str(expected[name]["xxh3"])

    try:
        with ThreadPoolExecutor(workers or default_workers()) as pool:
            same = dict(zip(stored, pool.map(one, stored), strict=True))
    finally:
        progress.end()
    problems += [
        f"{name} in {expected[name]['file']} was changed: its data has another hash than in {MANIFEST_NAME}"
        for name, is_same in same.items()
        if not is_same
    ]
    return total


def _hash(stored: _Stored, name: str, progress: Progress = NO_PROGRESS) -> str:
    return hash_range(stored.source, stored.start, stored.nbytes, "xxh3", progress, name)


def _fit(folder: Path) -> list[str]:
    """Does the folder open as a model, and do config, tensors and tokenizer agree?"""
    try:
        summary = summarize(open_checkpoint(folder))
    except LlmkitError as error:
        return [error.message]
    return list(summary.problems)
