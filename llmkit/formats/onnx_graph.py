"""ONNX graphs from outside: read, and checked where protobuf checks nothing.

Budget: protobuf's own, a file below 2 GiB, some three times its size in memory. No tensor's data is read here. Behind
it every tensor that lies in a file of its own is inside the graph's folder and inside that file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import InputError
from llmkit.lazy_imports import onnx

if TYPE_CHECKING:
    from google.protobuf.message import Message

_MAX_NBYTES = 2**31 - 1
_REMEDY = "export the model again"
_BITS = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}  # of types whose names do not say it
# Operators whose inputs and attributes are looked at by their places.
_LEAST_INPUTS = {"MatMulNBits": 3, "GatherBlockQuantized": 3, "DequantizeLinear": 2, "Reshape": 2}
_NEEDED = {"MatMulNBits": ("K", "N")}


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph of a file, without the data that lies beside it.

    Raises:
        InputError: no ONNX graph, one cut short, nodes without their inputs, or data outside the graph's folder.
    """
    from google.protobuf.message import DecodeError

    try:
        if not path.is_file():
            raise InputError(f"{path} is no regular file; expected an ONNX graph")
        if path.stat().st_size > _MAX_NBYTES:
            raise InputError(f"{path} is {path.stat().st_size} bytes long; protobuf holds at most {_MAX_NBYTES}")
        model = onnx.load(path, load_external_data=False)
        if not model.graph.output:
            raise ValueError("it has no graph")
        _check_text(path, model)
        _check_nodes(path, model)
        for tensor in _tensors(model):
            if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
                place_of(path, tensor)
            if any(n < 0 for n in tensor.dims):
                raise InputError(f"{path}: {tensor.name} has shape {list(tensor.dims)}", hint=_REMEDY)
    except (DecodeError, OSError, ValueError) as error:  # ValueError: text that is no UTF-8, a NUL in a name
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is no ONNX model, or is cut short: {first[:300]}", hint=_REMEDY) from error
    return model


def place_of(path: Path, tensor: onnx.TensorProto) -> tuple[Path, int]:
    """The file beside the graph that holds a tensor, and where in it the data begins.

    Raises:
        InputError: outside the folder (by its name or by a link), not there, or an offset that is no place in it.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, folder = entries.get("location", ""), path.parent
    file = folder / location
    if not location or "\0" in location or len(location) > 1024:
        raise InputError(f"{path}: {tensor.name} lies at no usable location: {location[:80]!r}", hint=_REMEDY)
    home = Path(os.path.realpath(folder))  # unlike resolve, no error for a link that leads to itself
    roots = [home]
    if home.parent.name == "snapshots":  # the hub's cache keeps a snapshot's files beside it
        roots.append(home.parent.parent / "blobs")
    is_plain = not Path(location).is_absolute() and ".." not in Path(location).parts
    if not is_plain or not any(Path(os.path.realpath(file)).is_relative_to(root) for root in roots):
        raise InputError(
            f"{path}: the location of {tensor.name}, {location!r}, is outside the graph's folder",
            hint="do not use this graph, or move the file beside it and correct the location",
        )
    if not file.is_file():
        raise InputError(f"{path} needs {location}, which is not there", hint=_REMEDY)
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InputError(f"{path}: the {key} of {tensor.name} is {text[:40]!r}, expected a number", hint=_REMEDY)
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    if offset + length > file.stat().st_size:
        raise InputError(
            f"{file} has {file.stat().st_size} bytes, but {tensor.name} ends at byte {offset + length}",
            hint=f"the file was cut short or replaced: {_REMEDY}",
        )
    wanted = nbytes_of(tensor)
    if "length" in entries and wanted is not None and length != wanted:
        raise InputError(
            f"{path}: {tensor.name} is stated as {length} bytes of {location}; its shape and type have {wanted}",
            hint=_REMEDY,
        )
    return file, offset


def nbytes_of(tensor: onnx.TensorProto) -> int | None:
    """The bytes of a tensor's data outside the graph, by its shape and element type; None for one without a size."""
    bits = bits_of(kind_of(tensor.data_type))
    return None if bits is None else -(-math.prod(tensor.dims) * bits // 8)


def bits_of(kind: str) -> int | None:
    """The bits of an element, by the name of its type; None for one without a size (text)."""
    width = re.match(r"[A-Z]+(\d+)", kind)
    return int(width[1]) if width else _BITS.get(kind)


def kind_of(number: int) -> str:
    """The name of an element type; the number itself where it has none."""
    types = onnx.TensorProto.DataType
    return types.Name(number) if number in types.values() else str(number)


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the graphs inside them (protobuf bounds their depth)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from nodes_of(inner.node)


def _check_text(path: Path, message: Message) -> None:
    """Refuse text that is no UTF-8: protobuf gives it as bytes, in one graph among thousands of strings."""
    from google.protobuf.message import Message

    if isinstance(message, onnx.TensorProto):  # not its data, which would be copied
        texts: list[str | bytes] = [message.name, *(t for e in message.external_data for t in (e.key, e.value))]
        inner: list[Message] = []
    else:
        texts, inner = [], []
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                texts += [value] if isinstance(value, str | bytes) else value
            elif field.type == field.TYPE_MESSAGE:
                inner += [value] if isinstance(value, Message) else value
    for text in texts:
        if isinstance(text, bytes):
            raise InputError(f"{path}: a name in the graph is no UTF-8: {text[:40]!r}", hint=_REMEDY)
    for one in inner:
        _check_text(path, one)


def _check_nodes(path: Path, model: onnx.ModelProto) -> None:
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes_of(nodes):
            needed = _NEEDED.get(node.op_type, ())
            names = {attribute.name for attribute in node.attribute} if needed else set()
            lacks = [n for n in needed if n not in names]
            if len(node.input) < _LEAST_INPUTS.get(node.op_type, 0) or not node.output or lacks:
                raise InputError(
                    f"{path}: the node {node.name or '?'} ({node.op_type or 'no operator'}) lacks "
                    f"{', '.join(lacks) or 'inputs or outputs'}",
                    hint=_REMEDY,
                )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors that a graph holds, in nodes, graphs inside nodes and functions, too."""
    yield from _held(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _held(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (a for node in nodes for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _held(graph)
