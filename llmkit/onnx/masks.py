"""What is added to attention scores: padding, windows, an open prefix, biases of keys."""

from __future__ import annotations

from typing import Any

from llmkit.lazy_imports import np
from llmkit.onnx.context import GraphContext
from llmkit.onnx.graph import Value
from llmkit.onnx.positions import GraphPositions

# Not -inf: a row of padding sees nothing, and its softmax has to stay finite. By compute dtype: float16 ends at -65504.
HIDDEN = {"FLOAT": -1e9, "FLOAT16": -3e4, "BFLOAT16": -1e9}


def score_bias(
    context: GraphContext, positions: GraphPositions, window: int | None, *, causal: bool, chunk: int | None = None
) -> Value:
    """[B, 1 or heads, S, T] in the compute dtype: what the attention op adds to the scores before its softmax.

    Args:
        positions: brings biases of keys and an open prefix.
        window: a query sees the last `window` keys; None for all.
        causal: later keys are hidden here, too (the op does not do it).
        chunk: a query sees the keys of its own chunk of so many positions; None for all.
    """
    key = ("score bias", id(positions), window, chunk, causal)
    bias: Value = context.once(key, lambda: _build(context, positions, window, chunk, causal))
    return bias


def _build(
    context: GraphContext, positions: GraphPositions, window: int | None, chunk: int | None, causal: bool
) -> Any:
    g = context.graph
    real = g.cast(g.op("Unsqueeze", context.mask, g.ints(1, 2)), "BOOL")  # [B, 1, 1, T]
    prefix = positions.prefix(context)
    hidden = g.op("Not", real)
    if window is not None or chunk is not None or causal or prefix is not None:
        key, query = _places(context)
        later = g.op("Greater", key, query)  # [S, T]
        if window is not None:
            later = g.op("Or", later, _outside_window(context, window))
        if chunk is not None:
            later = g.op("Or", later, _outside_chunk(context, chunk))
        if prefix is not None:
            place = g.op("Unsqueeze", context.key_positions(), g.ints(1, 2))
            outside = g.op("GreaterOrEqual", place, g.op("Unsqueeze", prefix, g.ints(1, 2, 3)))
            later = g.op("And", later, outside)
        hidden = g.op("Or", hidden, later)
    bias = g.op("Where", hidden, g.number(HIDDEN[context.dtype]), g.number(0.0))
    key_bias = positions.key_bias(context)
    heads = 1
    if key_bias is not None:
        if context.dtype != "FLOAT":
            # A softmax does not change when all scores of a row do. Half precision is fine near zero: there lie the
            # biases of the nearest keys then.
            key_bias = g.op("Sub", key_bias, g.op("ReduceMax", key_bias, g.ints(-1), keepdims=1))
        bias = g.op("Add", bias, g.op("Unsqueeze", key_bias, g.ints(2)))
        heads = context.model.dims.heads
    shape = g.op("Concat", context.batch(), g.ints(heads), context.length(), context.total(), axis=0)
    bias = g.op("Expand", bias, shape)
    return bias if context.dtype == "FLOAT" else g.cast(bias, context.dtype)


def _outside_window(context: GraphContext, window: int) -> Any:
    """[B, 1, S, T]: keys that a query's window has left behind; padding takes no room in it."""
    g, (place, query) = context.graph, _positions(context)
    first = g.op("Unsqueeze", g.op("Sub", query, g.ints(window)), g.ints(1, 3))
    return g.op("LessOrEqual", g.op("Unsqueeze", place, g.ints(1, 2)), first)


def _outside_chunk(context: GraphContext, chunk: int) -> Any:
    """[B, 1, S, T]: keys before the chunk of a query."""
    g, (place, query) = context.graph, _positions(context)
    first = g.op("Unsqueeze", g.op("Mul", g.op("Div", query, g.ints(chunk)), g.ints(chunk)), g.ints(1, 3))
    return g.op("Less", g.op("Unsqueeze", place, g.ints(1, 2)), first)


def _positions(context: GraphContext) -> tuple[Any, Any]:
    """Positions of all tokens [B, T] and of the new ones [B, S]."""
    g, place = context.graph, context.key_positions()
    return place, g.op("Slice", place, g.op("Sub", context.total(), context.length()), context.total(), g.ints(1))


def _places(context: GraphContext) -> tuple[Any, Any]:
    """Indices of keys [1, T] and of the new queries [S, 1] among all T tokens."""

    def make() -> tuple[Any, Any]:
        g = context.graph
        total = g.op("Squeeze", context.total(), g.ints(0))
        start, one = g.constant(np.array(0, dtype=np.int64)), g.constant(np.array(1, dtype=np.int64))
        index = g.op("Range", start, total, one)
        first = g.op("Sub", context.total(), context.length())
        query = g.op("Slice", index, first, context.total())
        return g.op("Unsqueeze", index, g.ints(0)), g.op("Unsqueeze", query, g.ints(1))

    places: tuple[Any, Any] = context.once("indices", make)
    return places
