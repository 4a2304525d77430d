"""A small file of a checkpoint, as what it holds or how it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.json_text import parse_object

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class FileContent:
    """A small file that belongs to a checkpoint: on disk, new bytes made by a transform, or made when they are read.

    Attributes:
        check: what is to be said of the bytes before they are written, where something is (a warning of the plan).
    """

    path: Path | None = None
    data: bytes | None = None
    make: Callable[[], bytes] | None = None
    check: Callable[[bytes], str | None] | None = None

    @classmethod
    def of_json(cls, data: Any) -> FileContent:
        """JSON as transformers lays it out."""
        return cls(data=(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())

    def read(self) -> bytes:
        """The bytes."""
        if self.data is not None:
            return self.data
        if self.make is not None:
            return self.make()
        if self.path is None:
            return b""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error


def read_generation_config(files: Mapping[str, FileContent]) -> Mapping[str, Any]:
    """The contents of generation_config.json among the files of a checkpoint; empty where none can be read."""
    if GENERATION_CONFIG not in files:
        return {}
    try:
        return parse_object(files[GENERATION_CONFIG].read(), GENERATION_CONFIG)
    except InputError:
        return {}
