"""An ONNX folder as a container: model.onnx, the weights it changed, and links to the files that hold the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.formats.container import Layout, OutputFile
from llmkit.tensors.spec import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["DATA", "MODEL", "OnnxFiles", "Place"]

MODEL = "model.onnx"
DATA = "model.onnx.data"
_ALIGNMENT = 4096  # a page: ONNX Runtime maps what it refers to


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an initializer lie: a file in the folder of the model, offset and length in bytes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class OnnxFiles:
    """model.onnx refers to weights by file, offset and length.

    Attributes:
        model: the graph; its initializers get their places when the files are laid out.
        linked: places of the weights that stay in the files they are in, by initializer.
        sources: those files, by the name they have in the folder.
    """

    model: onnx.ModelProto
    linked: Mapping[str, Place]
    sources: Mapping[str, Path]

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> Layout:
        offset, offsets = 0, {}
        for name, spec in specs.items():
            offsets[name] = offset
            offset += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT
        places = {name: Place(DATA, at, specs[name].nbytes) for name, at in offsets.items()}
        files = (OutputFile(DATA, offset, offsets, ()),) if specs else ()
        return Layout(files, {MODEL: _serialized(self.model, {**self.linked, **places})}, self.sources)


def _serialized(model: onnx.ModelProto, places: Mapping[str, Place]) -> bytes:
    import onnx

    for held in model.graph.initializer:
        place = places.get(held.name)
        if place is not None:
            held.data_location = onnx.TensorProto.EXTERNAL
            del held.external_data[:]
            for key, value in (("location", place.file), ("offset", place.offset), ("length", place.nbytes)):
                held.external_data.add(key=key, value=str(value))
    return bytes(model.SerializeToString(deterministic=True))
