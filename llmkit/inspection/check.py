"""Is a folder still what llmkit wrote? Sizes, hashes, names, index, and whether the parts fit together."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.manifest import MANIFEST_NAME, load_manifest
from llmkit.errors import LlmkitError, listing
from llmkit.formats import safetensors
from llmkit.formats.folder import is_weight_file
from llmkit.inspection.summary import summarize
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.tensors.lazy import Lazy, Read

__all__ = ["Verdict", "check_output"]

_CHUNK_NBYTES = 4 * 2**20


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
    manifest = load_manifest(folder)
    problems: list[str] = []
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    sound = [name for name in files if _has_size(folder, name, files[name], problems)]
    stored: dict[str, tuple[str, Lazy]] = {}
    for name in sound:
        if "header" in files[name]:
            _read_header(folder / name, files[name], stored, problems)
        elif _small_hash(folder / name) != files[name]["xxh3"]:
            problems.append(f"{name} was changed: its content has another hash than in {MANIFEST_NAME}")
    nbytes = _check_tensors(manifest["tensors"], stored, problems, workers, progress)
    problems += _fit(folder)
    extra = sorted(p.name for p in folder.iterdir() if p.name not in files and p.name != MANIFEST_NAME)
    problems += [f"{n} holds weights that llmkit did not write" for n in extra if is_weight_file(n)]
    notes = [f"{n} was added later" for n in extra if not is_weight_file(n)]
    return Verdict(tuple(problems), tuple(notes), len(files), len(manifest["tensors"]), nbytes)


def _has_size(folder: Path, name: str, entry: Mapping[str, Any], problems: list[str]) -> bool:
    path = folder / name
    if Path(name).name != name:
        problems.append(f"{MANIFEST_NAME} names {name!r}, which is outside the folder")
        return False
    if not path.is_file():
        problems.append(f"{name} is missing")
        return False
    found = path.stat().st_size
    if found != entry["nbytes"]:
        problems.append(f"{name} is {found} bytes long, expected {entry['nbytes']}")
        return False
    return True


def _small_hash(path: Path) -> str:
    return xxh3_128(path.read_bytes()).hexdigest()


def _read_header(
    path: Path, entry: Mapping[str, Any], stored: dict[str, tuple[str, Lazy]], problems: list[str]
) -> None:
    try:
        tensors, _ = safetensors.read(path)
    except LlmkitError as error:
        problems.append(error.message)
        return
    with path.open("rb") as file:
        head = file.read(8)
        header = head + file.read(int.from_bytes(head, "little"))
    if xxh3_128(header).hexdigest() != entry["header"]:
        problems.append(f"{path.name}: its header was changed")
    stored.update({name: (path.name, lazy) for name, lazy in tensors.items()})


def _check_tensors(
    expected: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, tuple[str, Lazy]],
    problems: list[str],
    workers: int | None,
    progress: Progress,
) -> int:
    problems += [f"tensor {n} is in {stored[n][0]}, not in {MANIFEST_NAME}" for n in stored if n not in expected]
    missing = [n for n in expected if n not in stored]
    if missing:
        problems.append(f"{len(missing)} tensors of {MANIFEST_NAME} are in no readable file: {listing(missing)}")
    present = [n for n in expected if n in stored]
    total = sum(stored[n][1].spec.nbytes for n in present)
    progress.begin(total, "hashing", "B")
    guard = threading.Lock()
    wrong: dict[str, str] = {}

    def one(name: str) -> None:
        file, lazy = stored[name]
        entry = expected[name]
        if (file, lazy.dtype.name, list(lazy.shape)) != (entry["file"], entry["dtype"], list(entry["shape"])):
            problem = f"{name}: {lazy.spec} in {file}, expected {entry['dtype']}{entry['shape']} in {entry['file']}"
        elif _hash(lazy, name, progress) != entry["xxh3"]:
            problem = f"{name} in {file} was changed: its data has another hash than in {MANIFEST_NAME}"
        else:
            return
        with guard:
            wrong[name] = problem

    try:
        with ThreadPoolExecutor(workers or min(len(os.sched_getaffinity(0)), 8)) as pool:
            list(pool.map(one, present))
    finally:
        progress.end()
    problems += [wrong[n] for n in present if n in wrong]
    return total


def _hash(lazy: Lazy, name: str, progress: Progress) -> str:
    node = lazy.node
    if not isinstance(node, Read):
        raise TypeError(f"{name} is no stored tensor")
    hasher = xxh3_128()
    end = node.offset + lazy.spec.nbytes
    for start in range(node.offset, end, _CHUNK_NBYTES):
        n = min(_CHUNK_NBYTES, end - start)
        hasher.update(node.source.read(start, n))
        progress.advance(n, name)
    return hasher.hexdigest()


def _fit(folder: Path) -> list[str]:
    """Does the folder open as a model, and do config, tensors and tokenizer agree?"""
    try:
        found = summarize(open_checkpoint(folder))
    except LlmkitError as error:
        return [error.message]
    return list(found.problems)
