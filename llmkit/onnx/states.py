"""Recurrences in a graph: the state that they hand on, rows whose padding follows their tokens, the short convolution.

`past_state.N.NAME` [B, …] is an input and `present_state.N.NAME` the output that the next call goes on from.
"""

from __future__ import annotations

from typing import Any

from llmkit.onnx.context import GraphContext
from llmkit.onnx.graph import Value
from llmkit.onnx.weights import GraphWeights


def past_state(
    context: GraphContext, layer: int, name: str, shape: list[int], dtype: str = "FLOAT", initial: float = 0.0
) -> Value:
    """What a layer's recurrence left of past tokens, [B, *shape]; `initial` everywhere at the start of a sequence."""
    stem = f"past_state.{layer}.{name}"
    if initial:
        context.initial[stem] = initial
    return context.graph.input(stem, dtype, ["batch_size", *shape])


def present_state(
    context: GraphContext, layer: int, name: str, value: Value, shape: list[int], dtype: str = "FLOAT"
) -> None:
    """Hand a state [B, *shape] on to the next call."""
    after = f"present_state.{layer}.{name}"
    context.graph.output(value, after, dtype, ["batch_size", *shape])
    context.state[f"past_state.{layer}.{name}"] = after


def before_padding(context: GraphContext, x: Value) -> Any:
    """X [B, S, width] with each row's tokens first and its padding after them."""
    order, _ = context.once("order", lambda: _order(context))
    return context.graph.op("GatherND", x, order, batch_dims=1)


def back_in_place(context: GraphContext, y: Value) -> Any:
    """The inverse of `before_padding`."""
    _, back = context.once("order", lambda: _order(context))
    return context.graph.op("GatherND", y, back, batch_dims=1)


def real_tokens(context: GraphContext) -> Any:
    """[B, S, 1] float32, 1 for tokens and 0 for the padding that follows them (see `before_padding`)."""

    def make() -> Any:
        g = context.graph
        return g.op("Unsqueeze", g.cast(g.op("Less", _places(context), _count(context)), "FLOAT"), g.ints(2))

    return context.once("real", make)


def last_tokens(context: GraphContext, whole: Value, n: int) -> Any:
    """The last `n` inputs of each row, [B, n, C], of [B, n + S, C]: those of the past, and the new ones."""

    def make() -> Any:
        g = context.graph
        return g.op("Unsqueeze", g.op("Add", _count(context), g.ints(*range(n))), g.ints(2))

    return context.graph.op("GatherND", whole, context.once(("last tokens", n), make), batch_dims=1)


def short_convolution(
    context: GraphContext, weights: GraphWeights, layer: int, x: Value, name: str = "conv", *others: str
) -> Any:
    """The causal convolution of each channel of x [B, S, C] (padding last) over a token and the K - 1 before it.

    The weight `NAME.weight` is [C, 1, K], the state [B, K - 1, C]; weights of `others` stand below it, or in it.
    """
    g = context.graph
    first = weights.slot(f"{name}.weight")
    below = [f"{stem}.weight" for stem in others if weights.slot(f"{stem}.weight").name != first.name]
    filters = [weights.value(leaf) for leaf in (f"{name}.weight", *below)]
    width = first.shape[2]
    shape = [width - 1, first.shape[0] + sum(weights.slot(leaf).shape[0] for leaf in below)]
    whole = g.op("Concat", past_state(context, layer, name, shape, weights.dtype), x, axis=1)
    filter_ = filters[0] if len(filters) == 1 else g.op("Concat", *filters, axis=0)
    taps = g.op("Transpose", g.op("Squeeze", filter_, g.ints(1)), perm=[1, 0])
    y = weights.value(f"{name}.bias") if weights.has(f"{name}.bias") else None
    for k, tap in enumerate(g.op("Split", taps, g.ints(*[1] * width), n=width, axis=0)):
        end = g.op("Add", context.length(), g.ints(k))
        term = g.op("Mul", g.op("Slice", whole, g.ints(k), end, g.ints(1)), tap)
        y = term if y is None else g.op("Add", y, term)
    present_state(context, layer, name, last_tokens(context, whole, width - 1), shape, weights.dtype)
    return y


def _new(context: GraphContext) -> Any:
    """[B, S] int64: 1 for new tokens, 0 for padding."""
    g = context.graph
    first = g.op("Sub", context.total(), context.length())
    return context.once("new", lambda: g.op("Slice", context.mask, first, context.total(), g.ints(1)))


def _count(context: GraphContext) -> Any:
    """[B, 1] int64: how many new tokens each row has."""
    return context.once("count", lambda: context.graph.op("ReduceSum", _new(context), context.graph.ints(1)))


def _order(context: GraphContext) -> tuple[Any, Any]:
    """[B, S, 1] int64 both: which token each place takes, tokens first; and the place of each token then."""
    g, new = context.graph, _new(context)
    padding = g.op("Sub", g.ints(1), new)
    before, between = (g.op("Sub", g.op("CumSum", x, g.ints(1)), g.ints(1)) for x in (new, padding))
    after = g.op("Mul", padding, g.op("Add", between, _count(context)))
    back = g.op("Add", g.op("Mul", new, before), after)
    order = g.op("ScatterElements", back, back, _places(context), axis=1)
    return g.op("Unsqueeze", order, g.ints(2)), g.op("Unsqueeze", back, g.ints(2))


def _places(context: GraphContext) -> Any:
    """[B, S] int64: 0, 1, 2, … in each row."""
    g = context.graph
    ones = g.op("Expand", g.ints(1), g.op("Shape", context.ids))
    return context.once("new places", lambda: g.op("Sub", g.op("CumSum", ones, g.ints(1)), g.ints(1)))
