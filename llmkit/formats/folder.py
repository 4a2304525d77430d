"""A folder of weight files: which files hold the weights, single or sharded, safetensors or torch pickles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from llmkit.errors import InputError, listing
from llmkit.formats import imatrix, safetensors, torch_pickle
from llmkit.formats.json_text import read_object
from llmkit.formats.unreadable import (
    WEIGHT_SUFFIXES,
    kind_of_entry,
    no_weight_file,
    no_weights,
    read_head,
    refuse_no_files,
    refuse_pointer,
)
from llmkit.tensors.equality import are_equal
from llmkit.tensors.lazy import Lazy, reads_below

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_SETS = tuple(name for pair in zip(SINGLE_NAMES, INDEX_NAMES, strict=True) for name in pair)
"""What a folder is read by, the first that is there, in the order in which transformers looks."""
_NO_WEIGHTS = ("training_args", "rng_", "tokenizer.bin", "optimizer.", "scheduler.", "scaler.")
_MAX_NAME = 1024  # as GGUF's; a number in a name then is one that int() takes
_NUMBERED = re.compile(r"(.*?)-?(\d+)-of-(\d+)(\.\w+)")


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights (or their index), which a transform writes anew."""
    return name in INDEX_NAMES or (name.endswith(WEIGHT_SUFFIXES) and not name.startswith(_NO_WEIGHTS))


def read_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one weight file, whatever its format (recognised by its first bytes, not its name)."""
    head = read_head(path)
    refuse_pointer(path, head)
    readers: list[tuple[Callable[[bytes], bool], Callable[[Path], dict[str, Lazy]]]] = [
        (safetensors.looks_like, lambda p: safetensors.read(p)[0]),
        (torch_pickle.looks_like, torch_pickle.read),
    ]
    for matches, read in readers:
        if matches(head):
            tensors = read(path)
            long = next((name for name in tensors if len(name) > _MAX_NAME), None)
            if long is not None:
                raise InputError(f"{path}: a tensor's name has {len(long)} characters, expected at most {_MAX_NAME}")
            return tensors
    if imatrix.looks_binary(head):
        raise InputError(
            f"{path} is an importance matrix of llama.cpp: sums of a model's inputs, not weights",
            hint=f"llmkit quantize MODEL --bits 4 --statistics {shlex.quote(str(path))} -o OUT",
        )
    raise no_weight_file(path, head)


def read_folder(folder: Path) -> dict[str, Lazy]:
    """All tensors of a checkpoint folder, read from headers only.

    The set is the one transformers takes (`WEIGHT_SETS`): a single file before shards, safetensors before pickles. An
    index is followed and checked: it may only name files inside the folder, every file must exist, and every tensor
    must be in the file that the index says.
    """
    chosen = weight_set(folder)
    if chosen is not None:
        return _read_sharded(folder, chosen) if chosen.name in INDEX_NAMES else read_file(chosen)
    loose = _loose(folder)
    if not loose:
        refuse_no_files(folder, sorted(p.name for p in folder.iterdir() if is_weight_file(p.name) and not p.is_dir()))
        raise no_weights(folder)
    refuse_gaps(folder, loose)
    return _joined(folder, loose)


def left_unread(folder: Path, tensors: Mapping[str, Lazy]) -> list[str]:
    """Weight files of a folder that `read_folder`, which read `tensors`, passed over: another set, or strays."""
    chosen = weight_set(folder)
    if chosen is None:
        return []
    read = {chosen.name, *(r.source.path.name for r in reads_below(lazy.origin for lazy in tensors.values()))}
    indexes = [name for name in INDEX_NAMES if (folder / name).is_file()]
    graphs = sorted(p.name for p in folder.glob("*.onnx"))
    return [name for name in [*indexes, *(p.name for p in _loose(folder)), *graphs] if name not in read]


def weight_set(folder: Path) -> Path | None:
    """The file that says where a folder's weights are; None where their names are none of the usual."""
    return next((folder / name for name in WEIGHT_SETS if (folder / name).is_file()), None)


def _loose(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if is_weight_file(p.name) and p.name not in INDEX_NAMES and p.is_file())
    return sorted(p for p in files if p.suffix != ".gguf")


def refuse_gaps(folder: Path, files: list[Path]) -> None:
    """Refuse shards without an index whose names say that there are more of them."""
    sets: dict[tuple[str, str, str], list[int]] = {}
    for path in files:
        if m := _NUMBERED.fullmatch(path.name):
            sets.setdefault((m[1], m[3], m[4]), []).append(int(m[2]))
    for (_, n, _), numbers in sets.items():
        if len(numbers) < int(n):
            raise InputError(
                f"{folder}: {len(numbers)} of {int(n)} shards are there: {listing(p.name for p in files)}; no index",
                hint="download the missing files and the index",
            )


def _joined(folder: Path, files: list[Path]) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    for path in files:
        for name, lazy in read_file(path).items():
            if name in tensors:
                raise InputError(
                    f"{folder}: tensor {name!r} is in more than one of {listing(p.name for p in files)}",
                    hint="keep one set of weights in the folder, or give one of the files",
                )
            tensors[name] = lazy
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        raise InputError(f"{index}: no usable weight_map (expected an object of tensor name to file name)")
    for name in dict.fromkeys(weight_map.values()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index}: {name!r} points outside the folder; expected a plain file name")
    return weight_map


def _read_sharded(folder: Path, index: Path) -> dict[str, Lazy]:
    weight_map = _weight_map(index)
    if not weight_map:
        raise _empty(folder, index)
    files = dict.fromkeys(weight_map.values())
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise _missing(folder, index, weight_map, missing)
    sets = {m.group(1, 3, 4) for name in files if (m := _NUMBERED.fullmatch(name))}
    others = [p.name for p in _loose(folder) if (m := _NUMBERED.fullmatch(p.name)) and m.group(1, 3, 4) in sets]
    if beside := [name for name in others if name not in files]:
        raise _stale(index, f"{index}: it names no tensor of {listing(beside)}, of the same set as {next(iter(files))}")
    shards = {name: read_file(folder / name) for name in files}
    try:
        tensors = {name: shards[file][name] for name, file in weight_map.items()}
    except KeyError:
        tensor_name, file_name = next((t, f) for t, f in weight_map.items() if t not in shards[f])
        message = f"{index}: tensor {tensor_name!r} should be in {file_name}, which does not hold it"
        there = {name for present in shards.values() for name in present}
        if set(weight_map) <= there:
            message += f"; the files hold all its {len(weight_map)} tensors, in other places"
            raise _stale(index, message) from None
        raise InputError(
            message,
            hint=f"download both again; or, where the model has no such tensor, {_moved(index)}",
        ) from None
    stray = [f"{t} ({f})" for f, present in shards.items() for t in present if t not in weight_map]
    if stray:
        raise _stale(index, f"{index}: {len(stray)} tensors of the shards are not in the index: {listing(stray)}")
    _refuse_other_copies(index, weight_map, shards)
    return tensors


def _refuse_other_copies(index: Path, weight_map: Mapping[str, str], shards: Mapping[str, dict[str, Lazy]]) -> None:
    """Refuse a tensor with other values in a later shard, which transformers takes whatever the index says."""
    for file in sorted(shards):
        for name, lazy in shards[file].items():
            named = weight_map[name]
            if file > named and not are_equal(shards[named][name], lazy):
                raise InputError(
                    f"{index}: tensor {name!r} is in {named}, as the index says, and with other values in {file}",
                    hint="download both files again: one of them is of another model",
                )


def _empty(folder: Path, index: Path) -> InputError:
    """The error for an index that names no tensor; the files beside it may hold them."""
    others = _loose(folder)
    try:
        refuse_gaps(folder, others)
        n = len(_joined(folder, others))
    except InputError:
        n = 0
    message = f"{index}: its weight_map names no tensor"
    if n:
        return _stale(index, f"{message}; {listing(p.name for p in others)} hold {n}")
    return InputError(message, hint="download the index and the files that it names again")


def _missing(folder: Path, index: Path, weight_map: dict[str, str], missing: list[str]) -> InputError:
    """The error for shards that an index names and that are missing; other files may hold their tensors."""
    n_files = len(dict.fromkeys(weight_map.values()))
    message = f"{folder}: {len(missing)} of {n_files} shards are missing: {listing(missing)}"
    message += "".join(f"; {name} is {kind}" for name in missing[:1] if (kind := kind_of_entry(folder / name)))
    others = _loose(folder)
    strays = [p for p in others if p.name not in weight_map.values()]
    try:
        refuse_gaps(folder, others)
        joined = _joined(folder, others)
    except InputError:
        joined = {}
    if joined.keys() == weight_map.keys():
        return _stale(
            index,
            f"{message}. {listing(p.name for p in others)} hold all {len(joined)} tensors that {index.name} lists",
        )
    if strays:
        message += f"; also there: {listing(p.name for p in strays)}, which the index does not name"
    return InputError(message, hint="download the missing files")


def _stale(index: Path, message: str) -> InputError:
    return InputError(
        f"{message}: the index is of other files", hint=f"{_moved(index)}; without it the files are read as they are"
    )


def _moved(index: Path) -> str:
    return f"mv {shlex.quote(str(index))} {shlex.quote(f'{index}.old')}"
