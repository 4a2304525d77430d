"""One file of raw tensors behind a header, in an order that the format gives: no directory, no names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmkit.formats.container import OutputFile, OutputFiles, must_cover
from llmkit.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class StreamFile:
    """A file of parts one behind the other.

    Attributes:
        name: the file's name.
        parts: bytes that are fixed, or the name of a tensor whose data stands there.
    """

    name: str
    parts: Sequence[bytes | str]

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        must_cover(specs, (p for p in self.parts if isinstance(p, str)), self.name)
        fixed, offsets, position = [], {}, 0
        for part in self.parts:
            if isinstance(part, bytes):
                fixed.append((position, part))
                position += len(part)
            else:
                offsets[part] = position
                position += specs[part].nbytes
        return OutputFiles((OutputFile(self.name, position, offsets, tuple(fixed)),))
