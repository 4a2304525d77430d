"""RWKV-4's layer in ONNX: the recurrence is one Scan over the tokens, its state an input and an output.

The recurrence and its state are float32 in every compute dtype, as in the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.onnx.states import back_in_place, before_padding, last_tokens, past_state, present_state, real_tokens

from .mix import SMALLEST

if TYPE_CHECKING:
    from llmkit.architecture.kinds import LayerNorm
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.weights import GraphWeights

    from .kind import TimeAndChannelMix

_STATE = ("last_channel", "last_time", "numerator", "denominator", "largest")


def emit_layer(
    kind: TimeAndChannelMix, context: GraphContext, weights: GraphWeights, layer: int, stream: Stream
) -> None:
    """One layer on the stream; its states are those of `mix.py`."""
    g, hidden = context.graph, context.model.dims.hidden
    last_z, last_y, *held = (
        past_state(context, layer, name, [hidden], initial=SMALLEST if name == "largest" else 0.0) for name in _STATE
    )
    with g.scope("attn"):
        attn = weights.under("attn")
        y = before_padding(context, stream.normed(kind.norm, weights.under("attn_norm")))
        before, last_y = shifted(context, weights, y, last_y)
        k, v, r = (
            attn.linear(_mixed(attn, f"mix_{name}", y, before), leaf)
            for name, leaf in (("key", "k"), ("value", "v"), ("receptance", "r"))
        )
        mean, held = _weighted_mean(g, attn, k, v, held, real_tokens(context))
        stream.add(back_in_place(context, attn.linear(g.op("Mul", g.op("Sigmoid", r), mean), "o")))
    with g.scope("mlp"):
        mlp = weights.under("mlp")
        z = before_padding(context, stream.normed(kind.norm, weights.under("mlp_norm")))
        before, last_z = shifted(context, weights, z, last_z)
        key = g.op("Relu", mlp.linear(_mixed(mlp, "mix_key", z, before), "key"))
        value = mlp.linear(g.op("Mul", key, key), "value")
        gate = g.op("Sigmoid", mlp.linear(_mixed(mlp, "mix_receptance", z, before), "receptance"))
        stream.add(back_in_place(context, g.op("Mul", gate, value)))
    for name, after in zip(_STATE, (last_z, last_y, *held), strict=True):
        present_state(context, layer, name, after, [hidden])


def shifted(context: GraphContext, weights: GraphWeights, y: Any, last: Any) -> tuple[Any, Any]:
    """The token before each one, and the last one in float32; `last` [B, hidden] is the past's."""
    g = context.graph
    whole = g.op("Concat", weights.computed(g.op("Unsqueeze", last, g.ints(1))), y, axis=1)
    before = g.op("Slice", whole, g.ints(0), g.ints(-1), g.ints(1))
    return before, weights.single(g.op("Squeeze", last_tokens(context, whole, 1), g.ints(1)))


def head_normed(norm: LayerNorm, weights: GraphWeights, x: Any) -> Any:
    """A norm over each head of x [B, S, heads, head_dim] float32, its weights `head_norm` -> [B, S, hidden]."""
    g, dims = weights.graph, weights.model.dims
    ones = g.op("Expand", g.number(1.0), g.ints(dims.head_dim))
    centred = g.op("LayerNormalization", x, ones, axis=-1, epsilon=norm.epsilon)
    flat = weights.computed(g.op("Reshape", centred, g.ints(0, 0, dims.hidden)))
    return g.op("Add", g.op("Mul", flat, weights.value("head_norm.weight")), weights.value("head_norm.bias"))


def _mixed(weights: Any, name: str, y: Any, before: Any) -> Any:
    """Y * mix + before * (1 - mix)."""
    g = weights.graph
    return g.op("Add", before, g.op("Mul", g.op("Sub", y, before), weights.value(name)))


def _weighted_mean(g: Any, weights: Any, k: Any, v: Any, state: list[Any], real: Any) -> tuple[Any, list[Any]]:
    """The Scan; see `mix._weighted_mean` for the formula."""
    decay, first = (weights.single(weights.value(name)) for name in ("decay", "first"))
    decay = g.op("Neg", g.op("Exp", decay))
    hidden = weights.model.dims.hidden
    body = _body(decay, first, hidden)
    *held, out = g.op(
        "Scan", *state, weights.single(k), weights.single(v), real,
        n=4, body=body, num_scan_inputs=3, scan_input_axes=[1, 1, 1], scan_output_axes=[1],
    )  # fmt: skip
    return weights.computed(out), held


def _body(decay: Any, first: Any, hidden: int) -> Any:
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
