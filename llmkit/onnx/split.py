"""A graph in two: all that leads to the last hidden states, and the head that makes logits of them; or with a head that
sees the last column only.

The head is by far the largest product, and scoring and generation need it at few places. All parts refer to the same
files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmkit.lazy_imports import onnx

HIDDEN = "llmkit.hidden"
"""Metadata of a graph: the value that enters the head."""


def split_head(model: onnx.ModelProto) -> tuple[bytes, bytes]:
    """The serialized halves of a marked graph: the body, whose first output is the hidden states, and the head."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    hidden = metadata[HIDDEN]
    graph = model.graph
    shape: list[Any] = ["batch_size", "sequence_length", int(metadata["llmkit.hidden_size"])]
    typed = onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.DataType.Value(metadata["llmkit.dtype"]), shape)
    logits = [o for o in graph.output if o.name == "logits"]
    others = [o for o in graph.output if o.name != "logits"]
    body = _part(model, [], [typed, *others], set())
    return body, _part(model, [typed], logits, {hidden})


def last_column(model: onnx.ModelProto) -> bytes:
    """A marked graph, serialized, that gives logits [B, 1, vocab] of the last column alone."""
    hidden = next(entry.value for entry in model.metadata_props if entry.key == HIDDEN)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, last = copy.graph, f"{hidden}.last"
    at = next(i for i, node in enumerate(graph.node) if hidden in node.input)
    for node in graph.node[at:]:
        node.input[:] = [last if name == hidden else name for name in node.input]
    bounds = {f"{last}.starts": -1, f"{last}.ends": 2**62, f"{last}.axes": 1}
    graph.initializer.extend(
        onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [n]) for name, n in bounds.items()
    )
    graph.node.insert(at, onnx.helper.make_node("Slice", [hidden, *bounds], [last], name=last))
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    return bytes(copy.SerializeToString())


def _part(model: onnx.ModelProto, inputs: list[Any], outputs: list[Any], inside: set[str]) -> bytes:
    """The nodes that lead from `inside` and the graph's own inputs to `outputs`."""
    graph = model.graph
    needed = {o.name for o in outputs}
    nodes = []
    for node in reversed(graph.node):  # nodes are in order: a user of a value comes after its maker
        if (needed - inside).intersection(node.output):
            nodes.append(node)
            needed.update(_uses(node))
    part = onnx.GraphProto(name=graph.name)
    part.node.extend(reversed(nodes))
    part.input.extend([*inputs, *(i for i in graph.input if not inputs)])
    part.output.extend(outputs)
    part.initializer.extend(i for i in graph.initializer if i.name in needed)
    proto = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    proto.opset_import.extend(model.opset_import)
    proto.functions.extend(model.functions)
    proto.metadata_props.extend(model.metadata_props)
    proto.graph.CopyFrom(part)
    return bytes(proto.SerializeToString())


def _uses(node: onnx.NodeProto) -> Iterable[str]:
    """What a node reads, and what the graphs inside it read."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inside in inner.node:
                yield from _uses(inside)
