"""A folder of weight files: which files hold the weights, single or sharded, safetensors or torch pickles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmkit.errors import InputError, listing
from llmkit.formats import safetensors, torch_pickle
from llmkit.formats.json_text import read_object
from llmkit.tensors.lazy import Lazy

__all__ = ["INDEX_NAMES", "SINGLE_NAMES", "is_weight_file", "read_file", "read_folder"]

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NO_WEIGHTS = ("training_args", "rng_", "tokenizer.bin")


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights (or their index), which a transform writes anew."""
    return name in INDEX_NAMES or (name.endswith(_WEIGHT_SUFFIXES) and not name.startswith(_NO_WEIGHTS))


def read_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one weight file, whatever its format (told by its first bytes, not its name)."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-lfs pointer, not the weights", hint="fetch the real file: git lfs pull")
    readers: list[tuple[Callable[[bytes], bool], Callable[[Path], dict[str, Lazy]]]] = [
        (safetensors.looks_like, lambda p: safetensors.read(p)[0]),
        (torch_pickle.looks_like, torch_pickle.read),
    ]
    for matches, read in readers:
        if matches(head):
            return read(path)
    raise InputError(f"{path}: neither safetensors nor a torch pickle (first bytes {head[:8]!r})")


def read_folder(folder: Path) -> dict[str, Lazy]:
    """All tensors of a checkpoint folder, read from headers only.

    An index is followed and checked: it may only name files inside the folder, every file must exist, and every
    tensor must be in the file that the index says. safetensors win over pickles when a folder has both.
    """
    for name in INDEX_NAMES:
        index, single = folder / name, folder / SINGLE_NAMES[INDEX_NAMES.index(name)]
        if index.is_file():
            return _read_sharded(folder, index)
        if single.is_file():
            return read_file(single)
    loose = sorted(p for p in folder.iterdir() if p.is_file() and is_weight_file(p.name) and p.suffix != ".gguf")
    if not loose:
        raise InputError(
            f"{folder} holds no weights: found no model.safetensors, pytorch_model.bin or index of shards",
            hint="give the folder that holds config.json and the weight files",
        )
    tensors: dict[str, Lazy] = {}
    for path in loose:
        for tensor_name, lazy in read_file(path).items():
            if tensor_name in tensors:
                raise InputError(
                    f"{folder}: tensor {tensor_name!r} is in more than one of {listing(p.name for p in loose)}"
                )
            tensors[tensor_name] = lazy
    return tensors


def _read_sharded(folder: Path, index: Path) -> dict[str, Lazy]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index}: no usable weight_map (expected an object of tensor name to file name)")
    files = dict.fromkeys(weight_map.values())
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index}: {name!r} points outside the folder; expected a plain file name")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {listing(missing)}",
            hint="download the missing files",
        )
    shards = {name: read_file(folder / name) for name in files}
    tensors: dict[str, Lazy] = {}
    for tensor_name, file_name in weight_map.items():
        if tensor_name not in shards[file_name]:
            raise InputError(f"{index}: tensor {tensor_name!r} should be in {file_name}, which does not hold it")
        tensors[tensor_name] = shards[file_name][tensor_name]
    stray = [f"{t} ({f})" for f, found in shards.items() for t in found if t not in weight_map]
    if stray:
        raise InputError(f"{index}: {len(stray)} tensors of the shards are not in the index: {listing(stray)}")
    return tensors
