"""Export: a checkpoint as a folder that ONNX Runtime runs, its weights where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint, FileContent
from llmkit.errors import InputError, RequirementError, nearest
from llmkit.formats.folder import INDEX_NAMES
from llmkit.onnx.container import OnnxFiles, Place
from llmkit.onnx.context import AttentionOp
from llmkit.onnx.folder_files import runtime_files
from llmkit.onnx.genai import genai_config
from llmkit.onnx.model import build_graph
from llmkit.quantization import reading
from llmkit.tensors.lazy import Lazy, Read

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ATTENTIONS", "WEIGHTS", "Weights", "export"]

Weights = Literal["link", "copy"]
WEIGHTS: tuple[Weights, ...] = ("link", "copy")
ATTENTIONS: tuple[AttentionOp, ...] = ("gqa", "attention", "mha")
_ONNX_OF = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
_COMPUTE = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def export(
    ckpt: Checkpoint, *, weights: Weights = "link", dtype: str = "float32", attention: AttentionOp | None = None
) -> Checkpoint:
    """The checkpoint as an ONNX folder.

    Args:
        weights: `link` refers to the source files where a tensor is there as it is; `copy` writes all anew.
        dtype: the compute dtype; weights keep the dtype they are stored in.
        attention: the op that computes attention; by default the fastest that can compute the model.

    Raises:
        RequirementError: no plugin describes it, a kind has no emitter, or the attention op cannot compute it.
        SpecError: the tensors do not fit the config.
    """
    import onnx_ir as ir

    for value, known, what in ((weights, WEIGHTS, "--weights"), (dtype, tuple(_COMPUTE), "--dtype")):
        if value not in known:
            guess = nearest(value, known)
            raise InputError(
                f"{what} {value!r} is unknown; expected {', '.join(known)}",
                hint=f"did you mean {guess}?" if guess else "llmkit export --help",
            )
    notes = []
    if reading.is_quantized(ckpt.config):
        notes.append(f"dequantized from {reading.describe(ckpt.config)}")
        ckpt = reading.dequantized(ckpt)
    model = registry.require(dict(ckpt.config), ckpt.label).bind(dict(ckpt.config))
    model.check({name: lazy.spec for name, lazy in ckpt.tensors.items()}).raise_if_bad(ckpt.label)
    used: dict[str, Lazy] = {}

    def tensor_of(name: str, lazy: Lazy) -> ir.TensorProtocol:
        used[name] = lazy
        return ir.LazyTensor(_unread, ir.DataType[_ONNX_OF[lazy.dtype.name]], ir.Shape(lazy.shape), name=name)

    chosen, graph = _graph(model, ckpt, tensor_of, _COMPUTE[dtype], attention, used)
    linked, sources = _linked(used) if weights == "link" else ({}, {})
    files, more = runtime_files(ckpt)
    notes += more
    files["genai_config.json"] = _json(genai_config(ckpt, model, graph, chosen))
    if sources:
        files |= _index(ckpt)
        notes.append(f"{len(linked)} tensors stay in {', '.join(sources)}, shared with the source")
    return ckpt.derive(
        tensors={name: lazy for name, lazy in used.items() if name not in linked},
        config={},
        files=files,
        step={"transform": "export", "to": "onnx", "weights": weights, "dtype": dtype, "attention": chosen},
        notes=notes,
        container=OnnxFiles(graph, linked, sources),
    )


def _graph(
    model: Any, ckpt: Checkpoint, tensor_of: Any, dtype: str, attention: AttentionOp | None, used: dict[str, Lazy]
) -> tuple[AttentionOp, ir.Model]:
    """The graph with the op asked for, or with the first that can compute the model."""
    wanted = (attention,) if attention is not None else ATTENTIONS
    for op in wanted[:-1]:
        try:
            return op, build_graph(model, ckpt.tensors, tensor_of, dtype=dtype, attention=op)
        except RequirementError:
            used.clear()
    return wanted[-1], build_graph(model, ckpt.tensors, tensor_of, dtype=dtype, attention=wanted[-1])


def _unread() -> Any:
    raise InputError("the weights of a planned graph are not loaded")  # pragma: no cover - nothing asks for them


def _linked(used: dict[str, Lazy]) -> tuple[dict[str, Place], dict[str, Path]]:
    """Places of the tensors that lie in a file as they are needed, and the files by the name they get."""
    places: dict[str, Place] = {}
    sources: dict[str, Path] = {}
    for name, lazy in used.items():
        node = lazy.node
        if not isinstance(node, Read) or node.strides is not None:
            continue
        file = node.source.path.name
        if sources.setdefault(file, node.source.path) != node.source.path:
            continue  # two folders have a file of this name: the second one's tensors are written
        places[name] = Place(file, node.offset, lazy.spec.nbytes)
    return places, sources


def _index(ckpt: Checkpoint) -> dict[str, FileContent]:
    """The index of the shards that are linked: the folder is a checkpoint, too."""
    if ckpt.origin is None or not ckpt.origin.is_dir():
        return {}
    found = [ckpt.origin / name for name in INDEX_NAMES if (ckpt.origin / name).is_file()]
    return {path.name: FileContent(path=path) for path in found[:1]}


def _json(data: Any) -> FileContent:
    return FileContent(data=(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
