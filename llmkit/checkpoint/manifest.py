"""The manifest `llmkit.json`: what went in, what was done, with which versions, and what came out, with hashes.

Hashes are XXH3 (128 bits) of the raw bytes of a tensor (or of a small file), computed while streaming.
They find what is damaged or not the same; they are no signature against somebody who forges. (A delta of a 1.1B pair
took 3.6 to 5.0 s on two cores with BLAKE3, 2.9 to 3.6 s with XXH3.)
"nodes" holds the expressions of all tensors, each node once (`llmkit.tensors.nodes`); "from" of a tensor is an id in
it. Manifests of format 1 hold the whole expression there, inputs within inputs, and are read as well.
Everything but the entry "run" is the same for the same inputs and recipe. Its "xxh3" is the hash of all the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, nearest
from llmkit.formats.json_text import read_object
from llmkit.tensors.spec import MAX_DIMS, DType
from llmkit.version import __version__

MANIFEST_NAME = "llmkit.json"
MANIFEST_FORMAT = 2
_READ_FORMATS = (1, MANIFEST_FORMAT)
_MAX_EXPRESSION = 100_000  # nodes of one expression, written out: more than any that a command makes
_CHUNK_NBYTES = 4 * 2**20


def new_manifest(
    *,
    recipe: Iterable[Mapping[str, Any]],
    files: Mapping[str, Any],
    tensors: Mapping[str, Any] | None = None,
    nodes: Iterable[Any] | None = None,
    inputs: Iterable[Any] = (),
    notes: Iterable[str] = (),
    warnings: Iterable[str] = (),
    tools: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A manifest as this llmkit writes it.

    Args:
        tools: versions of other programs that made the files.
    """
    return {
        "format": MANIFEST_FORMAT,
        "versions": versions() | dict(tools or {}),
        "recipe": [dict(step) for step in recipe],
        "notes": list(notes),
        "warnings": list(warnings),
        "inputs": list(inputs),
        "files": dict(files),
        "tensors": dict(tensors or {}),
    } | ({"nodes": list(nodes)} if nodes is not None else {})


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that llmkit wrote.

    Raises:
        InputError: there is none, or it is not one.
    """
    manifest, damage = examine_manifest(folder)
    if damage is not None:
        raise InputError(damage, hint="it was damaged: make the folder again")
    return manifest


def examine_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest of a folder, and what is wrong with its form; nothing may be read of it then.

    Raises:
        InputError: there is none, or it is of another format.
    """
    path = folder / MANIFEST_NAME
    if not folder.exists():
        here = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        guess = nearest(folder.name, here)
        hint = f"did you mean {folder.parent / guess}?" if guess else "give a folder that llmkit wrote"
        raise InputError(f"{folder}: no such folder", hint=hint)
    if not folder.is_dir():
        inspect = f"llmkit inspect {folder} checks what a file of weights says of itself"
        hint = f"give the folder: {folder.parent}" if (folder.parent / MANIFEST_NAME).is_file() else inspect
        raise InputError(f"{folder} is no folder, and {MANIFEST_NAME} lies in one", hint=hint)
    if not path.is_file():
        raise InputError(
            f"{folder} has no {MANIFEST_NAME}: it was not written by llmkit",
            hint=f"llmkit inspect {folder} checks what a checkpoint says of itself",
        )
    try:
        manifest = read_object(path)
    except InputError as error:
        return {}, f"{path} cannot be read: {error}"
    if manifest.get("format") not in _READ_FORMATS:
        raise InputError(f"{path}: not a manifest of format {' or '.join(map(str, _READ_FORMATS))}")
    odd = next(_oddities(manifest), None)
    return manifest, None if odd is None else f"{path} is no manifest of llmkit's: {odd}"


def _oddities(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Entries of a manifest that have another type than llmkit writes; readers rely on the types after this check."""
    for key, kind in {
        "files": dict,
        "tensors": dict,
        "recipe": list,
        "inputs": list,
        "nodes": list,
        "run": dict,
    }.items():
        value = manifest.get(key, None if key in ("files", "tensors", "recipe") else kind())
        if not isinstance(value, kind):
            yield f"{key} is {_shown(value)}, expected {'an object' if kind is dict else 'a list'}"
            return
    for name, entry in manifest["files"].items():
        yield from _wrong(f"the file {name}", entry, {"nbytes": _count}, _FILE)
        if not entry.keys() & {"header", "linked", "xxh3"}:
            yield f"the file {name} has no hash"
    nodes = manifest.get("nodes", [])
    yield from _odd_nodes(nodes)
    for name, entry in manifest["tensors"].items():
        yield from _wrong(f"the tensor {name}", entry, _TENSOR, {"offset": _count})
        yield from (f"the tensor {name}: {odd}" for odd in _odd_expression(entry["from"], len(nodes)))
    for n, step in enumerate(manifest["recipe"]):
        yield from _wrong(f"step {n} of the recipe", step, {}, {"transform": _text})
    for n, entry in enumerate(manifest.get("inputs", ())):
        yield from _wrong(f"input {n}", entry, {"path": _text}, {"tensors": _texts})


def _wrong(what: str, entry: Any, needed: Mapping[str, _Check], more: Mapping[str, _Check]) -> Iterator[str]:
    """Entries of an object that are absent or of another type. Nothing may be read of it after the first."""
    if not isinstance(entry, dict):
        yield f"{what} is {_shown(entry)}, expected an object"
        return
    for key, is_right in {**needed, **more}.items():
        if key in entry and not is_right(entry[key]):
            yield f"{what}: {key} is {_shown(entry[key])}"
        elif key in needed and key not in entry:
            yield f"{what} has no {key}"


def _odd_nodes(nodes: list[Any]) -> Iterator[str]:
    sizes: list[int] = []
    for number, node in enumerate(nodes):
        odd = next(_odd_expression(node, number, is_entry=True), None)
        if odd is not None:
            yield f"node {number}: {odd}"
            return
        sizes.append(1 + sum(sizes[i] for i in node.get("inputs", ())))
        if sizes[-1] > _MAX_EXPRESSION:
            yield f"node {number} is made of {sizes[-1]} nodes"
            return


def _odd_expression(node: Any, n_before: int, *, is_entry: bool = False) -> Iterator[str]:
    """What is wrong with an expression, or with the entry of a table, whose inputs are `n_before` entries before it."""
    if _count(node) and not is_entry:
        if node >= n_before:
            yield f"node {node} is not in the table"
        return
    if not isinstance(node, dict) or not isinstance(node.get("op"), str):
        yield f"from is {_shown(node)}, expected an operation"
        return
    inputs = node.get("inputs", [])
    if not isinstance(inputs, list) or (is_entry and not all(_count(i) for i in inputs)):
        yield f"the inputs of {node['op']} are {_shown(inputs)}"
        return
    if node["op"] == "read" and not all(isinstance(node.get(k, ""), str) for k in ("file", "tensor")):
        yield "what it is read from is no text"
    for each in inputs:
        yield from _odd_expression(each, n_before if is_entry else 0)


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_DIMS and all(map(_count, value))


_Check = Callable[[Any], bool]
_FILE: dict[str, _Check] = {"header": _text, "xxh3": _text, "linked": _text, "sharing": _text, "mtime_ns": _count}
_TENSOR: dict[str, _Check] = {
    "file": _text, "dtype": lambda value: str(value) in DType.__members__, "shape": _shape, "xxh3": _text,
    "from": lambda value: isinstance(value, dict) or _count(value),
}  # fmt: skip


def node_of(manifest: Mapping[str, Any], reference: Any) -> dict[str, Any]:
    """A node of an expression: `reference` is its id, or, in a manifest of format 1, the node itself."""
    node: Mapping[str, Any] = reference if isinstance(reference, Mapping) else manifest["nodes"][reference]
    return dict(node)


def recipe_of(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The recipe recorded in a folder, or nothing where it has no readable manifest."""
    try:
        return tuple(load_manifest(folder).get("recipe", ()))
    except InputError:
        return ()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of all its other entries, stored in "run", the entry that differs from run to run."""
    run = {k: v for k, v in manifest.get("run", {}).items() if k != "xxh3"}
    return {**manifest, "run": run | {"xxh3": _hash_of({**manifest, "run": run})}}


def is_sealed(manifest: Mapping[str, Any]) -> bool | None:
    """Whether a manifest is as it was sealed; None for those of llmkit 0.1, which hold no hash of themselves."""
    run = manifest.get("run")
    if not isinstance(run, Mapping) or not run.keys() & {"plan", "out", "xxh3"}:
        return None
    return bool(sealed(manifest)["run"]["xxh3"] == run.get("xxh3"))


def _hash_of(manifest: Mapping[str, Any]) -> str:
    from xxhash import xxh3_128

    return xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def frame_hash(fd: int, spans: Iterable[tuple[int, int]], nbytes: int) -> str:
    """The hash of a weight file's bytes that belong to no tensor: its header, directory and padding.

    Args:
        spans: offset and length of each tensor's data.
        nbytes: the file's size.
    """
    from xxhash import xxh3_128

    hasher = xxh3_128()
    position = 0
    for start, length in [*sorted(spans), (nbytes, 0)]:
        while position < start:
            data = os.pread(fd, min(start - position, _CHUNK_NBYTES), position)
            if not data:
                return ""
            hasher.update(data)
            position += len(data)
        position = max(position, start + length)
    return hasher.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of what determines the bytes that are written, or a score: of `packages` those that are installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    tools = {"llmkit": __version__, "python": platform.python_version()}
    for package in packages or ("torch",):
        with suppress(PackageNotFoundError):
            tools[package] = version(package)
    return tools
