"""A graph in two: all that leads to the last hidden states, and the head that makes logits of them.

The head is by far the largest product, and scoring and generation need it at few places only. Both halves refer to the
same files, so that nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

__all__ = ["HIDDEN", "split_head"]

HIDDEN = "llmkit.hidden"
"""Metadata of a graph: the value that enters the head."""


def split_head(model: onnx.ModelProto) -> tuple[bytes, bytes] | None:
    """The serialized halves: the body, whose first output is the hidden states, and the head; None without a mark."""
    import onnx

    known = {entry.key: entry.value for entry in model.metadata_props}
    hidden = known.get(HIDDEN)
    if hidden is None:
        return None
    graph = model.graph
    shape: list[Any] = ["batch_size", "sequence_length", int(known["llmkit.hidden_size"])]
    typed = onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.DataType.Value(known["llmkit.dtype"]), shape)
    logits = [o for o in graph.output if o.name == "logits"]
    others = [o for o in graph.output if o.name != "logits"]
    body = _part(model, [], [typed, *others], set())
    return body, _part(model, [typed], logits, {hidden})


def _part(model: onnx.ModelProto, inputs: list[Any], outputs: list[Any], given: set[str]) -> bytes:
    """The nodes that lead from `given` and the graph's own inputs to `outputs`."""
    import onnx

    graph = model.graph
    needed = {o.name for o in outputs}
    nodes = []
    for node in reversed(graph.node):  # nodes are in order: a user of a value comes after its maker
        if (needed - given).intersection(node.output):
            nodes.append(node)
            needed.update(_uses(node))
    part = onnx.GraphProto(name=graph.name)
    part.node.extend(reversed(nodes))
    part.input.extend([*inputs, *(i for i in graph.input if not inputs)])
    part.output.extend(outputs)
    part.initializer.extend(i for i in graph.initializer if i.name in needed)
    made = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.metadata_props.extend(model.metadata_props)
    made.graph.CopyFrom(part)
    return bytes(made.SerializeToString())


def _uses(node: onnx.NodeProto) -> Iterable[str]:
    """What a node reads, and what the graphs inside it read."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inside in inner.node:
                yield from _uses(inside)
