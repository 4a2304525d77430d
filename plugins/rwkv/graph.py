"""RWKV-4's layer in ONNX: the recurrence is one Scan over the tokens, its state an input and an output.

The recurrence and its state are float32 in every compute dtype, as in the original.
"""

from __future__ import annotations

from typing import Any

from llmkit_plugins.rwkv.mix import SMALLEST, TimeAndChannelMix


def emit_layer(kind: TimeAndChannelMix, context: Any, weights: Any, layer: int, stream: Any) -> None:
    """One layer on the stream; `past_state.N` and `present_state.N` are [B, 5, hidden] as in `mix.py`."""
    g, hidden = context.graph, context.model.dims.hidden
    state = g.input(f"past_state.{layer}", "FLOAT", ["batch_size", 5, hidden])
    last_z, last_y, above, below, largest = g.op("Split", state, g.ints(1, 1, 1, 1, 1), n=5, axis=1)
    real = context.once("real", lambda: _real(context))
    shown = weights.computed(real)
    last_z, last_y = weights.computed(last_z), weights.computed(last_y)
    with g.scope("attn"):
        attn = weights.under("attn")
        y = g.op("Mul", stream.normed(kind.norm, weights.under("attn_norm")), shown)
        before = _shifted(g, y, last_y)
        k, v, r = (
            attn.linear(_mixed(attn, f"mix_{name}", y, before), leaf)
            for name, leaf in (("key", "k"), ("value", "v"), ("receptance", "r"))
        )
        mean, held = _weighted_mean(g, attn, k, v, (above, below, largest), real)
        stream.add(attn.linear(g.op("Mul", g.op("Sigmoid", r), mean), "o"))
    with g.scope("mlp"):
        mlp = weights.under("mlp")
        z = g.op("Mul", stream.normed(kind.norm, weights.under("mlp_norm")), shown)
        before = _shifted(g, z, last_z)
        key = g.op("Relu", mlp.linear(_mixed(mlp, "mix_key", z, before), "key"))
        value = mlp.linear(g.op("Mul", key, key), "value")
        gate = g.op("Sigmoid", mlp.linear(_mixed(mlp, "mix_receptance", z, before), "receptance"))
        stream.add(g.op("Mul", gate, value))
    after = g.op("Concat", weights.single(_last(g, z)), weights.single(_last(g, y)), *held, axis=1)
    g.output(after, f"present_state.{layer}", "FLOAT", ["batch_size", 5, hidden])
    context.state[f"past_state.{layer}"] = f"present_state.{layer}"
    context.initial[f"past_state.{layer}"] = [0.0, 0.0, 0.0, 0.0, SMALLEST]


def _real(context: Any) -> Any:
    """[B, S, 1] float32: 1 for tokens, 0 for padding."""
    g = context.graph
    own = g.op("Slice", context.mask, g.op("Sub", context.total(), context.length()), context.total(), g.ints(1))
    return g.op("Unsqueeze", g.op("Cast", own, to=1), g.ints(2))


def _last(g: Any, x: Any) -> Any:
    return g.op("Slice", x, g.ints(-1), g.ints(2**62), g.ints(1))


def _shifted(g: Any, y: Any, last: Any) -> Any:
    return g.op("Concat", last, g.op("Slice", y, g.ints(0), g.ints(-1), g.ints(1)), axis=1)


def _mixed(weights: Any, name: str, y: Any, before: Any) -> Any:
    """Y * mix + before * (1 - mix)."""
    g = weights.graph
    return g.op("Add", before, g.op("Mul", g.op("Sub", y, before), weights.value(name)))


def _weighted_mean(g: Any, weights: Any, k: Any, v: Any, state: tuple[Any, ...], real: Any) -> tuple[Any, list[Any]]:
    """The Scan; see `mix._weighted_mean` for the formula."""
    decay, first = (weights.single(weights.value(name)) for name in ("decay", "first"))
    decay = g.op("Neg", g.op("Exp", decay))
    hidden = weights.model.dims.extra["mixed"]
    flat = [g.op("Squeeze", s, g.ints(1)) for s in state]
    body = _body(g, decay, first, hidden)
    above, below, largest, out = g.op(
        "Scan", *flat, weights.single(k), weights.single(v), real,
        n=4, body=body, num_scan_inputs=3, scan_input_axes=[1, 1, 1], scan_output_axes=[1],
    )  # fmt: skip
    return weights.computed(out), [g.op("Unsqueeze", s, g.ints(1)) for s in (above, below, largest)]


def _body(outer: Any, decay: Any, first: Any, hidden: int) -> Any:
    """One token: (numerator, denominator, largest exponent, key, value, real) -> (the same three, the mean)."""
    import onnx_ir as ir

    from llmkit.onnx.graph import Graph

    b = Graph("token")
    shape = ["batch_size", hidden]
    above, below, largest, k, v = (b.input(n, "FLOAT", shape) for n in ("above", "below", "largest", "key", "value"))
    real = b.op("Cast", b.input("real", "FLOAT", ["batch_size", 1]), to=int(ir.DataType.BOOL))
    bonus = b.op("Add", k, first)
    mean_above, mean_below, _ = _joined(b, above, below, largest, bonus, v)
    found = _joined(b, above, below, b.op("Add", largest, decay), k, v)
    for name, new, old in zip(("above", "below", "largest"), found, (above, below, largest), strict=True):
        b.output(b.op("Where", real, new, old), f"{name}_after", "FLOAT", shape)
    b.output(b.op("Div", mean_above, mean_below), "mean", "FLOAT", shape)
    return ir.Graph(b.inputs, b.outputs, nodes=b.nodes, initializers=list(b.initializers.values()), name="token")


def _joined(b: Any, above: Any, below: Any, largest: Any, exponent: Any, value: Any) -> tuple[Any, Any, Any]:
    """Numerator and denominator with one more term, exponents kept below zero."""
    top = b.op("Max", largest, exponent)
    old, new = b.op("Exp", b.op("Sub", largest, top)), b.op("Exp", b.op("Sub", exponent, top))
    return b.op("Add", b.op("Mul", old, above), b.op("Mul", new, value)), b.op("Add", b.op("Mul", old, below), new), top
