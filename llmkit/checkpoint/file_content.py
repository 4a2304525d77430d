"""A small file of a checkpoint, as what it holds or how it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.json_text import parse_object

_MAX_NBYTES = 2**28  # of a file on disk, which a sparse one may have on no disk
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
        """The bytes.

        Raises:
            InputError: the file cannot be read, or is no small one.
        """
        if self.data is not None:
            return self.data
        if self.make is not None:
            return self.make()
        if self.path is None:
            return b""
        self.require_small()
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error

    def require_small(self) -> None:
        """Refuse a file that others would read whole.

        Raises:
            InputError: it is too long.
        """
        nbytes = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        if nbytes > _MAX_NBYTES:
            raise InputError(
                f"{self.path} is {nbytes} bytes long; a file beside the weights has at most {_MAX_NBYTES}",
                hint="copy it from the model's source again, or move it out of the folder",
            )


def read_generation_config(files: Mapping[str, FileContent]) -> tuple[Mapping[str, Any], list[str]]:
    """The contents of generation_config.json, empty where there are none, and a warning where it cannot be read."""
    try:
        content = files.get(GENERATION_CONFIG)
        return ({} if content is None else parse_object(content.read(), GENERATION_CONFIG)), []
    except InputError as error:
        said = f"{error.message}: it is passed over, as transformers does, and with it the tokens that end a text"
        return {}, [said]
