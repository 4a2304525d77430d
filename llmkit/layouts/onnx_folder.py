"""Folders that `llmkit export` wrote: a graph whose weights lie in files beside it.

The tensors are the graph's initializers, at the place that the graph says. What the export changed has another name
than in the checkpoint (a normalised head, quantized layers): such a folder is not a source for conversions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import InputError
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Opened
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FILE", "NAME", "ORIGINAL_CONFIG", "find"]

NAME = "onnx"
FILE = "model.onnx"
ORIGINAL_CONFIG = "config.original.json"
_OWN = ("genai_config.json", ORIGINAL_CONFIG)
_DTYPES = {
    "FLOAT": DType.F32, "DOUBLE": DType.F64, "FLOAT16": DType.F16, "BFLOAT16": DType.BF16, "INT64": DType.I64,
    "INT32": DType.I32, "INT16": DType.I16, "INT8": DType.I8, "UINT8": DType.U8, "BOOL": DType.BOOL,
    "FLOAT8E4M3FN": DType.F8_E4M3,
}  # fmt: skip


def find(candidate: Candidate) -> Opened | None:
    """What a folder with a model.onnx holds; None for anything else.

    Raises:
        InputError: the graph cannot be read, or a file that it refers to is missing or too short.
    """
    path = candidate.path
    if path.is_file():
        if path.suffix == ".onnx":
            raise InputError(f"{path} is a graph, whose weights lie beside it", hint=f"give the folder: {path.parent}")
        return None
    if FILE not in candidate.names:
        return None
    model = _read(path / FILE)
    tensors, inside = _tensors(path, model)
    config_name = ORIGINAL_CONFIG if ORIGINAL_CONFIG in candidate.names else "config.json"
    config = candidate.json(config_name) if config_name in candidate.names else {}
    return Opened(
        NAME, tensors, config, own=_OWN, warnings=() if config else (f"{path} has no config.json",),
        details={"onnx": _described(path, model, tensors, inside)},
    )  # fmt: skip


def _read(path: Path) -> ir.Model:
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        return ir.load(path)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is no ONNX model, or is cut short: {str(error).splitlines()[0]}", hint="export the model again"
        ) from error


def _tensors(folder: Path, model: ir.Model) -> tuple[dict[str, Lazy], int]:
    """The initializers that lie in files beside the graph, and the bytes of those inside it."""
    import onnx_ir as ir

    tensors: dict[str, Lazy] = {}
    sources: dict[str, SourceFile] = {}
    inside = 0
    for name, value in model.graph.initializers.items():
        held = value.const_value
        if not isinstance(held, ir.ExternalTensor):
            inside += held.nbytes if held is not None else 0
            continue
        file = str(held.location)
        path = folder / file
        if file not in sources:
            if not path.is_file():
                raise InputError(f"{folder / FILE} needs {file}, which is not there", hint="export the model again")
            sources[file] = SourceFile(path)
        shape = tuple(held.shape.numpy())
        dtype = _DTYPES.get(held.dtype.name)
        if dtype is None:
            if held.dtype.bitwidth != 4 or len(shape) != 2 or shape[1] % 2:
                continue  # elements smaller than a byte that have no whole bytes in a row
            dtype, shape = DType.U8, (shape[0], shape[1] // 2)
        spec = TensorSpec(dtype, shape)
        offset, end = held.offset or 0, (held.offset or 0) + spec.nbytes
        if end > sources[file].nbytes:
            raise InputError(
                f"{path} has {sources[file].nbytes} bytes, but {name} ends at byte {end}",
                hint="the file was cut short or replaced: export the model again",
            )
        tensors[name] = Lazy(Read(name, spec, sources[file], offset))
    return tensors, inside


def _described(folder: Path, model: ir.Model, tensors: Mapping[str, Lazy], inside: int) -> dict[str, Any]:
    """What `inspect` says of the graph."""
    graph = model.graph
    nodes = [*graph.all_nodes()]
    for function in model.functions.values():
        nodes += function.all_nodes()
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    weights: Counter[tuple[str, str]] = Counter()
    for lazy in tensors.values():
        (read,) = lazy.reads()
        weights[read.source.path.name, lazy.dtype.name] += lazy.spec.nbytes
    return {
        "producer": f"{model.producer_name or '?'} {model.producer_version or ''}".rstrip(),
        "ir_version": model.ir_version,
        "opset": {domain or "ai.onnx": version for domain, version in graph.opset_imports.items()},
        "ops": dict(ops.most_common()),
        "integers": _integers(nodes),
        "inputs": [_typed(value) for value in graph.inputs],
        "outputs": [_typed(value) for value in graph.outputs],
        "weights": [{"file": file, "dtype": d, "nbytes": n} for (file, d), n in weights.items()],
        "graph_nbytes": (folder / FILE).stat().st_size,
        "inside_nbytes": inside,
        "metadata": dict(model.metadata_props),
    }


def _integers(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """Grids that nodes compute with, in words, and the number of nodes of each."""
    found: Counter[str] = Counter()
    for node in nodes:
        about = {name: a.value for name, a in node.attributes.items()}
        if node.op_type == "DequantizeLinear" and "block_size" in about and node.inputs[0] is not None:
            kind = node.inputs[0].dtype
            words = f"{kind.name.lower() if kind is not None else '?'} blocks of {about['block_size']}"
            found[f"{words}, dequantized"] += 1
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
        words = f"int{about.get('bits', 4)} blocks of {about.get('block_size', 128)} "
        words += "symmetric" if zeros is None else "asymmetric"
        level = about.get("accuracy_level", 0)
        found[words + (f", accuracy level {level}" if node.op_type == "MatMulNBits" else ", rows of a table")] += 1
    return dict(found.most_common())


def _typed(value: ir.Value) -> dict[str, Any]:
    shape = [n if isinstance(n, int) else str(n.value) for n in value.shape] if value.shape is not None else None
    return {"name": value.name, "dtype": value.dtype.name if value.dtype is not None else None, "shape": shape}
