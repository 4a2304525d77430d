"""An ONNX folder as a container: model.onnx, the weights it changed, and links to the files that hold the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmkit.formats.container import OutputFile, OutputFiles, shard_names
from llmkit.layouts.onnx_folder import MODEL
from llmkit.lazy_imports import onnx
from llmkit.tensors.spec import TensorSpec

DATA = f"{MODEL}.data"
"""The file of weights that are written; `model.onnx-00001-of-00003.data` and so on where one would be too large."""
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

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        held: list[dict[str, int]] = [{}]
        sizes = [0]
        for name, spec in specs.items():
            offset = -(-sizes[-1] // _ALIGNMENT) * _ALIGNMENT
            if held[-1] and offset + spec.nbytes > max_nbytes:
                held.append({})
                sizes.append(offset := 0)
            held[-1][name], sizes[-1] = offset, offset + spec.nbytes
        names = shard_names(DATA, len(held))
        files = [OutputFile(*file, ()) for file in zip(names, sizes, held, strict=True)] if specs else []
        places = {name: Place(f.name, at, specs[name].nbytes) for f in files for name, at in f.offsets.items()}
        return OutputFiles(tuple(files), {MODEL: _serialized(self.model, {**self.linked, **places})}, self.sources)


def _serialized(model: onnx.ModelProto, places: Mapping[str, Place]) -> bytes:
    for held in model.graph.initializer:
        place = places.get(held.name)
        if place is not None:
            held.data_location = onnx.TensorProto.EXTERNAL
            del held.external_data[:]
            for key, value in (("location", place.file), ("offset", place.offset), ("length", place.nbytes)):
                held.external_data.add(key=key, value=str(value))
    return bytes(model.SerializeToString(deterministic=True))
