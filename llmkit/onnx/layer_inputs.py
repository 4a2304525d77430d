"""The graph reader of per-layer embeddings: `llmkit/architecture/layer_inputs.py`."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.altup import AltUpInputs
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import NoNorm
from llmkit.architecture.layer_inputs import InputGate, LayerInputs
from llmkit.onnx.context import GraphContext
from llmkit.onnx.gated import activation
from llmkit.onnx.norms import emit_as_long, emit_norm
from llmkit.onnx.weights import GraphWeights


def emit_inputs(kind: Kind, context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    """What the first layer takes; the inputs of all layers, of ids and embeddings x [B, S, hidden], into the context.

    Raises:
        RequirementError: no emitter for the kind.
    """
    return emitter_of(kind, _BESIDE)(context, weights, x)


def emit_gate(kind: Kind, context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    """What a layer adds of its input to x [B, S, hidden]; None for nothing.

    Raises:
        RequirementError: no emitter for the kind.
    """
    return emitter_of(kind, _GATES)(context, weights, x)


def _inputs(kind: LayerInputs, context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    if not kind.width:
        return x
    g = context.graph
    is_there = g.op("Less", context.ids, g.ints(kind.rows))
    ids = g.op("Where", is_there, context.ids, g.ints(0))
    rows = g.op("Mul", weights.rows("table.weight", ids), weights.number(kind.width**0.5))
    projected = g.op("Mul", weights.linear(x, "project"), weights.number(context.model.dims.hidden**-0.5))
    split = g.op("Reshape", projected, g.ints(0, 0, kind.layers, kind.width))
    normed = g.op("Reshape", emit_norm(kind.norm, weights.under("norm"), split), g.ints(0, 0, kind.columns))
    both = g.op("Mul", g.op("Add", normed, rows), weights.number(2.0**-0.5))
    widths = [kind.width] * kind.layers
    parts = g.op("Split", both, g.ints(*widths), n=kind.layers, axis=-1) if kind.layers > 1 else [both]
    context.inputs = {i * kind.width: part for i, part in enumerate(parts)}
    return x


def _streams(kind: AltUpInputs, context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    x = _inputs(kind, context, weights, x)
    others = [emit_as_long(weights, weights.linear(x, f"stream.{i}"), x) for i in range(1, kind.streams)]
    return context.graph.op("Concat", x, *others, axis=-1)


def _gate(kind: InputGate, context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    g = context.graph
    opened = activation(g, str(kind.act), weights.linear(x, "gate"))
    out = weights.linear(g.op("Mul", opened, context.inputs[kind.at]), "out")
    return emit_norm(kind.norm, weights.under("norm"), out)


_BESIDE: Hooks[Any] = {AltUpInputs: _streams, LayerInputs: _inputs, NoNorm: lambda kind, context, weights, x: x}
_GATES: Hooks[Any] = {InputGate: _gate, NoNorm: lambda kind, context, weights, x: None}
