"""GGUF as a container: one file, its header and every tensor's offset known from names, types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.errors import SpecError
from llmkit.formats.container import OutputFile, OutputFiles, must_cover
from llmkit.formats.gguf_header import encode_header
from llmkit.formats.gguf_types import TYPE_BY_NAME, GgufType
from llmkit.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class GgufContainer:
    """One GGUF file.

    Attributes:
        name: the file's name.
        metadata: key -> boolean, string, number or list, in the order of the file.
        types: tensor -> type of its elements, for all tensors. Blocks are bytes: U8 [..., bytes of a row].
    """

    name: str
    metadata: Mapping[str, Any]
    types: Mapping[str, str]

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        must_cover(specs, self.types, self.name)
        tensors = [
            (name, kind := TYPE_BY_NAME[self.types[name]], _shape(name, kind, spec)) for name, spec in specs.items()
        ]
        header, offsets, nbytes = encode_header(self.metadata, tensors)
        return OutputFiles((OutputFile(self.name, nbytes, offsets, ((0, header),)),))


def _shape(name: str, kind: GgufType, spec: TensorSpec) -> tuple[int, ...]:
    """The shape in elements."""
    if kind.dtype is not None:
        if spec.dtype is not kind.dtype:
            raise SpecError(f"{name} is {spec.dtype.name}, to be stored as {kind.name}")
        return spec.shape
    return (*spec.shape[:-1], spec.shape[-1] // kind.nbytes * kind.block)
