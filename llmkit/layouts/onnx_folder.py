"""Folders that `llmkit export` wrote: a graph whose weights lie in files beside it.

The tensors are the graph's initializers, at the place that the graph says. What the export changed has another name
than in the checkpoint (a normalised head, quantized layers): such a folder is not a source for conversions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.folder import WEIGHT_SETS, is_weight_file
from llmkit.formats.onnx_graph import bits_of, kind_of, nodes_of, place_of, read_graph
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Layout, OpenedLayout
from llmkit.lazy_imports import onnx
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

NAME = "onnx"
MODEL = "model.onnx"
ORIGINAL_CONFIG = "config.original.json"
_OWN = ("genai_config.json", ORIGINAL_CONFIG)
_DTYPES = {
    "FLOAT": DType.F32, "DOUBLE": DType.F64, "FLOAT16": DType.F16, "BFLOAT16": DType.BF16, "INT64": DType.I64,
    "INT32": DType.I32, "INT16": DType.I16, "INT8": DType.I8, "UINT8": DType.U8, "BOOL": DType.BOOL,
    "FLOAT8E4M3FN": DType.F8_E4M3,
}  # fmt: skip
_NO_WEIGHTS = ("INT64", "INT32", "BOOL", "STRING")  # shapes, indices and masks
STATE = "llmkit.state"  # a graph that llmkit wrote says so by this entry of its metadata


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a folder with a model.onnx holds; None for anything else, a graph beside a model's own weights included.

    Raises:
        InputError: the graph cannot be read, or a file that it refers to is missing or too short.
    """
    path = candidate.path
    if path.is_file():
        if path.suffix == ".onnx":
            raise InputError(f"{path} is a graph, whose weights lie beside it", hint=f"give the folder: {path.parent}")
        return None
    if MODEL not in candidate.names:
        return None
    model = read_graph(path / MODEL)
    tensors, inside = _tensors(path, model)
    read = {r.source.path.name for lazy in tensors.values() for r in lazy.reads()}
    if any(name in WEIGHT_SETS for name in candidate.names) and not read & {*filter(is_weight_file, candidate.names)}:
        return None  # weights under transformers' names go first, and the graph has others
    config_name = ORIGINAL_CONFIG if ORIGINAL_CONFIG in candidate.names else "config.json"
    config = candidate.json(config_name) if config_name in candidate.names else {}
    return OpenedLayout(
        NAME, tensors, config, own=_OWN, warnings=() if config else (f"{path} has no config.json",),
        details={"onnx": _described(path, model, tensors, inside)},
    )  # fmt: skip


def _tensors(folder: Path, model: onnx.ModelProto) -> tuple[dict[str, Lazy], Counter[str]]:
    """The initializers that lie in files beside the graph, and the bytes of those inside it by dtype."""
    tensors: dict[str, Lazy] = {}
    sources: dict[Path, SourceFile] = {}
    inside: Counter[str] = Counter()
    for held in model.graph.initializer:
        name, shape, kind = held.name, tuple(held.dims), kind_of(held.data_type)
        dtype = _DTYPES.get(kind)
        bits = bits_of(kind) or 8
        if not held.external_data:
            inside[kind if dtype is None else dtype.name] += -(-math.prod(shape) * bits // 8)
            continue
        file, offset = place_of(folder / MODEL, held)
        if file not in sources:
            sources[file] = SourceFile(file)
        if dtype is None:
            if bits != 4 or len(shape) != 2 or shape[1] % 2:
                continue  # elements smaller than a byte that have no whole bytes in a row
            dtype, shape = DType.U8, (shape[0], shape[1] // 2)
        spec = TensorSpec(dtype, shape)
        end = offset + spec.nbytes
        if end > sources[file].nbytes:
            raise InputError(
                f"{file} has {sources[file].nbytes} bytes, but {name} ends at byte {end}",
                hint="the file was cut short or replaced: export the model again",
            )
        tensors[name] = Lazy(Read(name, spec, sources[file], offset))
    return tensors, inside


def _described(
    folder: Path, model: onnx.ModelProto, tensors: Mapping[str, Lazy], inside: Mapping[str, int]
) -> dict[str, Any]:
    """The description of the graph for `inspect`."""
    graph = model.graph
    nodes = [*nodes_of(graph.node)]
    for function in model.functions:
        nodes += nodes_of(function.node)
    ops = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    weights: Counter[tuple[str, str]] = Counter()
    for lazy in tensors.values():
        (read,) = lazy.reads()
        weights[read.source.path.name, lazy.dtype.name] += lazy.spec.nbytes
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return {
        "producer": f"{model.producer_name or '?'} {model.producer_version or ''}".rstrip(),
        "ir_version": model.ir_version,
        "opset": {imports.domain or "ai.onnx": imports.version for imports in model.opset_import},
        "ops": dict(ops.most_common()),
        "integers": _integers(nodes, {held.name: kind_of(held.data_type) for held in graph.initializer}),
        "kv_cache": _kv_cache(_typed(value) for value in graph.input),
        "inputs": [_typed(value) for value in graph.input],
        "outputs": [_typed(value) for value in graph.output],
        "weights": [{"file": file, "dtype": d, "nbytes": n} for (file, d), n in weights.items()],
        "graph_nbytes": (folder / MODEL).stat().st_size,
        "inside_nbytes": sum(inside.values()),
        "inside": dict(inside),
        "n_parameters": None if STATE in metadata else _n_parameters(nodes, graph.initializer),
        "metadata": metadata,
    }


def _n_parameters(nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]) -> int:
    """Elements of the float model that a graph of another program computes with.

    Weights in blocks of integers are counted as the matrices that they stand for; their scales and zero points, and
    those of quantized operators, are no parameters.
    """
    sizes = {held.name: math.prod(held.dims) for held in initializers if kind_of(held.data_type) not in _NO_WEIGHTS}
    for node in nodes:
        about = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            sizes |= {name: 0 for name in node.input[2:] if name} | {node.input[1]: about["K"] * about["N"]}
        elif node.op_type == "GatherBlockQuantized":
            codes, _, *grid = node.input
            n = next((math.prod(h.dims) * 8 // about.get("bits", 4) for h in initializers if h.name == codes), 0)
            sizes |= {name: 0 for name in grid if name} | {codes: n}
        elif node.op_type == "DequantizeLinear":
            sizes |= {name: 0 for name in node.input[1:] if name}
    return sum(sizes.values())


def _integers(nodes: Iterable[onnx.NodeProto], kinds: Mapping[str, str]) -> dict[str, int]:
    """Grids that nodes compute with, in words, and the number of nodes of each.

    Args:
        kinds: the element types of initializers.
    """
    counts: Counter[str] = Counter()
    nodes = [*nodes]
    reshaped = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Reshape"}
    for node in nodes:
        about = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "DequantizeLinear" and "block_size" in about:
            words = f"{kinds.get(node.input[0], '?').lower()} blocks of {about['block_size']}"
            counts[f"{words}, dequantized"] += 1
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        zeros = node.input[3] if len(node.input) > 3 else ""
        words = f"int{about.get('bits', 4)} blocks of {about.get('block_size', 128)} "
        scales = node.input[2]  # a tied head has the embedding's, reshaped like its codes
        scales = reshaped.get(scales, scales)
        has_offsets = scales.removesuffix("scales") + "offsets" in kinds
        words += "with offsets" if has_offsets else "asymmetric" if zeros else "symmetric"
        level = about.get("accuracy_level", 0)
        counts[words + (f", accuracy level {level}" if node.op_type == "MatMulNBits" else ", rows of a table")] += 1
    return dict(counts.most_common())


def _kv_cache(inputs: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Dtypes of the keys and values that go on from call to call, and their bytes for a token; None without any."""
    held = [i for i in inputs if i["name"].endswith((".key", ".value")) and i["dtype"] in _DTYPES and i["shape"]]
    sizes = [_DTYPES[i["dtype"]].itemsize * math.prod(n for n in i["shape"] if isinstance(n, int)) for i in held]
    dtypes = ", ".join(dict.fromkeys(i["dtype"] for i in held))
    # All sizes but those of the batch and the tokens must be stated.
    is_stated = all(sum(not isinstance(n, int) for n in i["shape"]) <= 2 for i in held)
    return {"dtype": dtypes, "nbytes_per_token": sum(sizes) if is_stated else None} if held else None


def _typed(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [n.dim_value if n.HasField("dim_value") else n.dim_param or "?" for n in kind.shape.dim]
    return {
        "name": value.name,
        "dtype": kind_of(kind.elem_type) if kind.elem_type else None,
        "shape": shape if kind.HasField("shape") else None,
    }


LAYOUT = Layout(NAME, find, has_own_format=True)
