"""A path that may hold a checkpoint of any layout: its names, first bytes and config, each read once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.folder import INDEX_NAMES, WEIGHT_SETS, is_weight_file, read_file, read_folder
from llmkit.formats.json_text import read_object
from llmkit.formats.unreadable import read_head
from llmkit.formats.wrappers import without_wrappers
from llmkit.tensors.lazy import Lazy

_HEAD_NBYTES = 512


class Candidate:
    """What layouts ask of a path.

    Args:
        path: an existing file or folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def folder(self) -> Path:
        """The folder, or the one the file lies in."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the files in the folder."""
        return tuple(sorted(p.name for p in self.folder.iterdir() if p.is_file()))

    @cached_property
    def main(self) -> Path | None:
        """The file that holds the weights: the one given, or the only one of the folder."""
        if self.path.is_file():
            return self.path
        usual = [n for n in WEIGHT_SETS if n in self.names]
        loose = [n for n in self.names if is_weight_file(n)]
        chosen = usual[:1] if usual else loose if len(loose) == 1 else []
        return self.folder / chosen[0] if chosen and chosen[0] not in INDEX_NAMES else None

    def own_files(self, pattern: re.Pattern[str]) -> list[Path]:
        """The folder's files of a layout that names its weights so, by name.

        Empty where the path is another file, or where the folder has weights under transformers' names, which go first.
        """
        files = [self.folder / name for name in self.names if pattern.fullmatch(name)]
        is_other = self.path.is_file() and self.path not in files
        return [] if is_other or any(name in self.names for name in WEIGHT_SETS) else files

    @cached_property
    def head(self) -> bytes:
        """The first bytes of the main file; none where there is no such file or it cannot be read."""
        if self.main is None:
            return b""
        try:
            return read_head(self.main, _HEAD_NBYTES)
        except InputError:
            return b""

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder.

        Raises:
            InputError: it is no JSON, or no object.
        """
        return read_object(self.folder / name)

    @property
    def tensors(self) -> Mapping[str, Lazy]:
        """The tensors of one file or of all shards, by the names of the files without those of torch's wrappers.

        Raises:
            InputError: neither safetensors nor torch files, or damaged ones.
        """
        return self._read[0]

    @property
    def wrapper_notes(self) -> tuple[str, ...]:
        """What was taken off the names of `tensors`."""
        return tuple(self._read[1]) if "_read" in self.__dict__ else ()

    @cached_property
    def _read(self) -> tuple[dict[str, Lazy], list[str]]:
        stored = read_file(self.path) if self.path.is_file() else read_folder(self.path)
        return without_wrappers(stored, str(self.path))
