"""RWKV-4's layer in ONNX: the recurrence is one Scan over the tokens, its state an input and an output.

The recurrence and its state are float32 in every compute dtype, as in the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .mix import SMALLEST

if TYPE_CHECKING:
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.weights import GraphWeights

    from .kind import TimeAndChannelMix


def emit_layer(
    kind: TimeAndChannelMix, context: GraphContext, weights: GraphWeights, layer: int, stream: Stream
) -> None:
    """One layer on the stream; `past_state.N` and `present_state.N` are [B, 5, hidden] as in `mix.py`."""
    g, hidden = context.graph, context.model.dims.hidden
    state = g.input(f"past_state.{layer}", "FLOAT", ["batch_size", 5, hidden])
    last_z, last_y, above, below, largest = g.op("Split", state, g.ints(1, 1, 1, 1, 1), n=5, axis=1)
    real = context.once("real", lambda: _real(context))
    earlier = context.once("earlier", lambda: _earlier(context))
    last_z, last_y = weights.computed(last_z), weights.computed(last_y)
    with g.scope("attn"):
        attn = weights.under("attn")
        y = stream.normed(kind.norm, weights.under("attn_norm"))
        before, last_y = _shifted(g, y, last_y, earlier)
        k, v, r = (
            attn.linear(_mixed(attn, f"mix_{name}", y, before), leaf)
            for name, leaf in (("key", "k"), ("value", "v"), ("receptance", "r"))
        )
        mean, held = _weighted_mean(g, attn, k, v, (above, below, largest), real)
        stream.add(attn.linear(g.op("Mul", g.op("Sigmoid", r), mean), "o"))
    with g.scope("mlp"):
        mlp = weights.under("mlp")
        z = stream.normed(kind.norm, weights.under("mlp_norm"))
        before, last_z = _shifted(g, z, last_z, earlier)
        key = g.op("Relu", mlp.linear(_mixed(mlp, "mix_key", z, before), "key"))
        value = mlp.linear(g.op("Mul", key, key), "value")
        gate = g.op("Sigmoid", mlp.linear(_mixed(mlp, "mix_receptance", z, before), "receptance"))
        stream.add(g.op("Mul", gate, value))
    after = g.op("Concat", weights.single(last_z), weights.single(last_y), *held, axis=1)
    g.output(after, f"present_state.{layer}", "FLOAT", ["batch_size", 5, hidden])
    context.state[f"past_state.{layer}"] = f"present_state.{layer}"
    context.initial[f"past_state.{layer}"] = [0.0, 0.0, 0.0, 0.0, SMALLEST]


def _new(context: GraphContext) -> Any:
    """[B, S] int64: 1 for new tokens, 0 for padding."""
    g = context.graph
    first = g.op("Sub", context.total(), context.length())
    return context.once("new", lambda: g.op("Slice", context.mask, first, context.total(), g.ints(1)))


def _real(context: GraphContext) -> Any:
    """[B, S, 1] float32: 1 for tokens, 0 for padding."""
    g = context.graph
    return g.op("Unsqueeze", g.op("Cast", _new(context), to=1), g.ints(2))


def _earlier(context: GraphContext) -> Any:
    """[B, S + 1, 1] int64: the token before each one and before what comes next, counted from 1; 0: the past's last.

    ONNX has no running maximum: the tokens' places in order (TopK), looked up by how many tokens there were before.
    """
    g, new = context.graph, _new(context)
    none = g.op("Expand", g.ints(0), g.op("Concat", context.batch(), g.ints(1), axis=0))
    count = g.op("CumSum", g.op("Expand", g.ints(1), g.op("Shape", new)), g.ints(1))
    later = g.op("Add", g.op("Mul", g.op("Sub", g.ints(1), new), context.length()), count)  # padding after all tokens
    places, _ = g.op("TopK", later, context.length(), n=2, axis=1, largest=0)
    places = g.op("Concat", none, places, axis=1)
    n_before = g.op("Concat", none, g.op("CumSum", new, g.ints(1)), axis=1)
    return g.op("Unsqueeze", g.op("GatherElements", places, n_before, axis=1), g.ints(2))


def _shifted(g: Any, y: Any, last: Any, earlier: Any) -> tuple[Any, Any]:
    """The token before each one, and the last one; `last` [B, 1, hidden] is the past's."""
    shifted = g.op("GatherND", g.op("Concat", last, y, axis=1), earlier, batch_dims=1)
    before = g.op("Slice", shifted, g.ints(0), g.ints(-1), g.ints(1))
    return before, g.op("Slice", shifted, g.ints(-1), g.ints(2**62), g.ints(1))


def _mixed(weights: Any, name: str, y: Any, before: Any) -> Any:
    """Y * mix + before * (1 - mix)."""
    g = weights.graph
    return g.op("Add", before, g.op("Mul", g.op("Sub", y, before), weights.value(name)))


def _weighted_mean(g: Any, weights: Any, k: Any, v: Any, state: tuple[Any, ...], real: Any) -> tuple[Any, list[Any]]:
    """The Scan; see `mix._weighted_mean` for the formula."""
    decay, first = (weights.single(weights.value(name)) for name in ("decay", "first"))
    decay = g.op("Neg", g.op("Exp", decay))
    hidden = weights.model.dims.hidden
    flat = [g.op("Squeeze", s, g.ints(1)) for s in state]
    body = _body(g, decay, first, hidden)
    above, below, largest, out = g.op(
        "Scan", *flat, weights.single(k), weights.single(v), real,
        n=4, body=body, num_scan_inputs=3, scan_input_axes=[1, 1, 1], scan_output_axes=[1],
    )  # fmt: skip
    return weights.computed(out), [g.op("Unsqueeze", s, g.ints(1)) for s in (above, below, largest)]


def _body(outer: Any, decay: Any, first: Any, hidden: int) -> Any:
    """One token: (numerator, denominator, largest exponent, key, value, real) -> (the same three, the mean)."""
    from llmkit.onnx.graph import Graph

    b = Graph("token")
    shape: list[int | str] = ["batch_size", hidden]
    above, below, largest, k, v = (b.input(n, "FLOAT", shape) for n in ("above", "below", "largest", "key", "value"))
    real = b.cast(b.input("real", "FLOAT", ["batch_size", 1]), "BOOL")
    bonus = b.op("Add", k, first)
    mean_above, mean_below, _ = _joined(b, above, below, largest, bonus, v)
    state = _joined(b, above, below, b.op("Add", largest, decay), k, v)
    for name, new, old in zip(("above", "below", "largest"), state, (above, below, largest), strict=True):
        b.output(b.op("Where", real, new, old), f"{name}_after", "FLOAT", shape)
    b.output(b.op("Div", mean_above, mean_below), "mean", "FLOAT", shape)
    return b


def _joined(b: Any, above: Any, below: Any, largest: Any, exponent: Any, value: Any) -> tuple[Any, Any, Any]:
    """Numerator and denominator with one more term, exponents kept below zero."""
    top = b.op("Max", largest, exponent)
    old, new = b.op("Exp", b.op("Sub", largest, top)), b.op("Exp", b.op("Sub", exponent, top))
    return b.op("Add", b.op("Mul", old, above), b.op("Mul", new, value)), b.op("Add", b.op("Mul", old, below), new), top
