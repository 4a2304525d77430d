"""Which GGUF files make a model: one file, or the parts of a split one (`x-00001-of-00003.gguf`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.formats.gguf_header import MAGIC, GgufFile, GgufTensor, read_header

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """A model in one file or several.

    Attributes:
        label: a short name for messages.
        files: in order of their numbers.
        metadata: of the first file.
        tensors: name -> the file that holds it, and where.
    """

    label: str
    files: tuple[GgufFile, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[GgufFile, GgufTensor]]


def looks_like(head: bytes) -> bool:
    """Whether a file that begins with `head` is GGUF."""
    return head.startswith(MAGIC)


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file (the first, of a split one) in a folder; None when there is none.

    Raises:
        InputError: there are several models.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".gguf" and p.is_file())
    # A vision tower beside the language model is a file of its own.
    names = [n for n in names if not n.startswith("mmproj")] or names
    splits = {(match[1], match[3]) if (match := _PART.fullmatch(n)) else (n, ""): n for n in reversed(names)}
    if len(splits) > 1:
        raise InputError(
            f"{folder} holds {len(splits)} GGUF models: {listing(sorted(splits.values()))}",
            hint=f"give one of the files: {folder / min(splits.values())}",
        )
    return folder / next(iter(splits.values())) if splits else None


def read_model(path: Path) -> GgufModel:
    """The headers of a model, whichever of its files is given.

    Raises:
        InputError: a file is missing, malformed, or not of this model.
    """
    match = _PART.fullmatch(path.name)
    paths = [path]
    label = path.stem
    if match is not None:
        label, number, total = match[1], int(match[2]), int(match[3])
        if not 1 <= number <= total:
            raise InputError(f"{path} is named as part {number} of {total}", hint="give the file its original name")
        paths = [path.with_name(f"{label}-{i + 1:05d}-of-{total:05d}.gguf") for i in range(total)]
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            raise InputError(
                f"{path.parent}: {len(missing)} of {total} parts of {label} are missing: {listing(missing)}",
                hint="download the missing files",
            )
    files = tuple(read_header(p) for p in paths)
    count = files[0].metadata.get("split.count", 1)
    if count not in (0, len(files)):
        raise InputError(
            f"{path} is one of {count} parts, whose names should end in -0000N-of-{count:05d}.gguf",
            hint="give all parts their original names",
        )
    tensors: dict[str, tuple[GgufFile, GgufTensor]] = {}
    for i, file in enumerate(files):
        number = file.metadata.get("split.no", i)
        if number != i:
            raise InputError(f"{file.source.path} says that it is part {number + 1}, its name says part {i + 1}")
        for tensor in file.tensors:
            if tensor.name in tensors:
                raise InputError(f"{file.source.path}: tensor {tensor.name!r} is also in another part")
            tensors[tensor.name] = (file, tensor)
    if not tensors:
        raise InputError(
            f"{path} holds no tensors", hint="give the GGUF of a model: a file of a vocabulary alone is none"
        )
    return GgufModel(label, files, files[0].metadata, tensors)
