"""From an architecture to a graph: embedding, layers, head; weights are named as the checkpoint names them.

Inputs are those that ONNX Runtime GenAI and Optimum feed: `input_ids` and `position_ids` [B, S], `attention_mask`
[B, T], `past_key_values.N.key|value` [B, kv_heads, P, head_dim]; outputs `logits` [B, S, vocab] float32 and
`present.N.key|value`. A family whose positions or memory are of another sort adds inputs of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmkit.architecture.keys import as_bool, as_float
from llmkit.architecture.kinds import LearnedPositions, NoPositions
from llmkit.architecture.model import Model
from llmkit.errors import RequirementError
from llmkit.onnx.blocks import emit_layer
from llmkit.onnx.context import AttentionOp, GraphContext
from llmkit.onnx.graph import Graph
from llmkit.onnx.norms import Stream, emit_norm
from llmkit.onnx.positions import build_positions
from llmkit.onnx.weights import GraphWeights
from llmkit.tensors.lazy import Apply, Lazy

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from llmkit.onnx.weights import TensorOf

__all__ = ["build_graph"]


def build_graph(
    model: Model,
    tensors: Mapping[str, Lazy],
    tensor_of: TensorOf,
    *,
    dtype: str = "FLOAT",
    attention: AttentionOp = "attention",
) -> ir.Model:
    """The ONNX model of a checkpoint.

    Args:
        model: the architecture bound to the config.
        tensors: the checkpoint's tensors by name; specs are enough, unless `tensor_of` loads.
        tensor_of: what the initializer of a tensor holds: its data, or where it lies.
        dtype: the compute dtype: FLOAT, FLOAT16 or BFLOAT16; logits are float32.
        attention: the op that computes attention.

    Raises:
        RequirementError: a kind has no emitter, or the attention op cannot compute the model.
    """
    graph = Graph(model.family)
    ids = graph.input("input_ids", "INT64", ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
    positions = graph.input("position_ids", "INT64", ["batch_size", "sequence_length"])
    context = GraphContext(graph, model, dtype, attention, ids, mask, positions)
    weights = GraphWeights(graph, model, tensors, tensor_of, dtype)
    stream = Stream(weights, _embedded(context, weights))
    kinds = [getattr(block, "position", NoPositions()) for block in model.blocks]
    readers = {kind: build_positions(kind) for kind in kinds}
    for i, (kind, block) in enumerate(zip(kinds, model.blocks, strict=True)):
        with graph.scope(f"layers.{i}"):
            emit_layer(block, context, weights.under(f"layers.{i}"), i, readers[kind], stream)
    with graph.scope("head"):
        hidden = stream.normed(model.final_norm, weights.under("final_norm"))
        logits = _logits(context, weights, hidden)
    shape: list[int | str] = ["batch_size", "sequence_length", model.dims.vocab]
    graph.output(logits, "logits", "FLOAT", shape, is_first=True)
    told = {"family": model.family, "attention": attention}
    told |= {"hidden": str(hidden.name), "hidden_size": str(model.dims.hidden), "dtype": dtype}
    told |= {"state": json.dumps(context.state), "initial": json.dumps(context.initial)}
    return graph.model({f"llmkit.{key}": value for key, value in told.items()})


def _embedded(context: GraphContext, weights: GraphWeights) -> Any:
    kind, g = context.model.embedding, context.graph
    with g.scope("embed"):
        # Rows are taken first and cast then: the table itself stays as it is stored, in the file.
        x = _computed(context, g.op("Gather", weights.stored("embed.weight"), context.ids), weights, "embed.weight")
        if kind.scale is not None:
            x = g.op("Mul", x, weights.number(as_float(kind.scale)))
        if weights.has("embed_proj.weight"):
            x = weights.linear(x, "embed_proj")
        if isinstance(kind.positions, LearnedPositions):
            at = context.positions
            if kind.positions.offset:
                at = g.op("Add", at, g.ints(kind.positions.offset))
            rows = g.op("Gather", weights.stored("positions.weight"), at)
            x = g.op("Add", x, _computed(context, rows, weights, "positions.weight"))
        elif not isinstance(kind.positions, NoPositions):
            raise RequirementError(f"the ONNX export cannot add {type(kind.positions).__name__} to embeddings")
        return emit_norm(kind.norm, weights.under("embed_norm"), x)


def _computed(context: GraphContext, value: Any, weights: GraphWeights, leaf: str) -> Any:
    import onnx_ir as ir

    if weights.stored(leaf).dtype == ir.DataType[context.dtype]:
        return value
    return context.graph.op("Cast", value, to=int(ir.DataType[context.dtype]))


def _logits(context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    g, kind = context.graph, context.model.head
    if weights.has("head_proj.weight"):
        x = weights.linear(x, "head_proj")
    leaf = "embed.weight" if context.model.is_tied else "head.weight"
    slot = weights.slot(leaf)
    if as_bool(kind.normalized):
        matrix = weights.derived(f"{slot.name}.normalized", _normalized(weights.lazy(slot)))
        logits = g.op("FusedMatMul", x, matrix, domain="com.microsoft", transB=1)
    else:
        logits = weights.product(x, slot)
    if weights.has("head.bias"):
        logits = g.op("Add", logits, weights.value("head.bias"))
    logits = weights.single(logits)
    if kind.softcap is not None:
        cap = g.number(as_float(kind.softcap))
        logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap)
    return logits


def _normalized(weight: Lazy) -> Lazy:
    def fn(x: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)

    return Apply("row / norm", [weight], weight.spec, fn, scratch=2.0).output()
