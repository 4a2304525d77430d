"""Containers: how named tensors lie in files, so that every byte's place is known before any data moves.

A container is asked once, when a plan is made: given the specs of all tensors it answers with files. For each file it
says which bytes are fixed (headers, directories), where each tensor's bytes begin, and how long the file is. Tensors
are stored raw, row-major and little-endian, so that the runner can write any slice of any of them at any time. What
depends on the data, such as the checksums of a zip, is added at the end by `OutputFile.finish`.

To add a container: a frozen dataclass with `lay_out`. It may know more than the specs (metadata, another name or file
for each tensor); a transform that renames tensors for it puts it into the checkpoint together with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import Protocol

from llmkit.errors import SpecError, listing
from llmkit.formats import safetensors
from llmkit.tensors.spec import TensorSpec

# Bytes and the absolute offset in the file at which they belong.
Chunks = Sequence[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One weight file of an output.

    Attributes:
        name: the file's name in the folder.
        nbytes: its size, known in advance.
        offsets: absolute offset of each tensor, by the tensor's name in the checkpoint, in file order.
        fixed: the bytes that do not depend on the data. What neither these, nor a tensor, nor `finish` covers is zero.
        finish: gets the CRC-32 of each tensor's bytes and gives the rest; called once, when all tensors are written.
        stored: the tensors' names in the file, where they are not the checkpoint's.
    """

    name: str
    nbytes: int
    offsets: Mapping[str, int]
    fixed: Chunks
    finish: Callable[[Mapping[str, int]], Chunks] | None = None
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors, in file order."""
        return tuple(self.offsets)


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """All weight files, and what belongs to them.

    Attributes:
        small_files: whose bytes are known when the plan is made (an index of shards).
        links: input files that the output shares as they are: name in the folder -> where it lies.
    """

    files: tuple[OutputFile, ...]
    small_files: Mapping[str, bytes] = field(default_factory=dict)
    links: Mapping[str, Path] = field(default_factory=dict)


class Container(Protocol):
    """A way to lay tensors out in files. Equal containers give equal layouts."""

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        """Files for the tensors `specs`, in this order; a new file begins before one would exceed `max_nbytes`.

        A container whose files are given by the format ignores `max_nbytes`.

        Raises:
            SpecError: a tensor that the format cannot hold.
        """


def shard(specs: Mapping[str, TensorSpec], max_nbytes: int) -> list[dict[str, TensorSpec]]:
    """The tensors in groups of at most `max_nbytes` (a larger tensor is alone), in order."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_nbytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    return shards


def shard_names(name: str, n: int) -> list[str]:
    """`model.safetensors` for one file, else `model-00001-of-00003.safetensors` and so on."""
    stem, dot, suffix = name.rpartition(".")
    return [name] if n == 1 else [f"{stem}-{i + 1:05d}-of-{n:05d}{dot}{suffix}" for i in range(n)]


def index_json(name: str, files: Iterable[OutputFile], specs: Mapping[str, TensorSpec]) -> dict[str, bytes]:
    """The index of shards that transformers reads; nothing for a single file."""
    files = list(files)
    if len(files) == 1:
        return {}
    weight_map: dict[str, str] = {}
    for file in files:
        weight_map |= dict.fromkeys(file.offsets, encode_basestring(file.name))
    total = sum(s.nbytes for s in specs.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": {}}, indent=2)
    # The text of `indent=2`, which for a hundred thousand names takes half a second in Python.
    places = ",\n    ".join([f"{encode_basestring(t)}: {weight_map[t]}" for t in sorted(weight_map)])
    text = index.replace("{}", "{\n    " + places + "\n  }" if weight_map else "{}") + "\n"
    return {f"{name}.index.json": text.encode()}


@dataclass(frozen=True, slots=True)
class SafetensorsFiles:
    """safetensors, in shards with an index where they do not fit into one file.

    Attributes:
        name: the file's name when one holds all.
    """

    name: str = "model.safetensors"

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        shards = shard(specs, max_nbytes)
        files = []
        for name, held in zip(shard_names(self.name, len(shards)), shards, strict=True):
            header, offsets, nbytes = safetensors.layout(held, {"format": "pt"})
            files.append(OutputFile(name, nbytes, offsets, ((0, header),)))
        return OutputFiles(tuple(files), index_json(self.name, files, specs))


def must_cover(specs: Mapping[str, TensorSpec], placed: Iterable[str], what: str) -> None:
    """Refuse tensors that a container with given names has no place for, and places without a tensor."""
    places = dict.fromkeys(placed)
    stray = [n for n in specs if n not in places]
    absent = [n for n in places if n not in specs]
    if stray or absent:
        raise SpecError(
            f"{what} has no place for {listing(stray) or 'nothing more'} and lacks {listing(absent) or 'nothing'}",
            hint="convert to this layout last, after every other change",
        )
