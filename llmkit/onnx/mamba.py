"""The graph readers of state space models and of gated short convolutions; states are float32.

Mamba's scan is ONNX's `Scan` over the tokens; Mamba 2's is `com.microsoft::LinearAttention`, whose update rule "gated"
it is. Every layer has its rows' padding last, so that it changes no state.
"""

from __future__ import annotations

from typing import Any

from llmkit.architecture.keys import as_bool
from llmkit.architecture.kinds import RMSNorm
from llmkit.architecture.mamba import SelectiveScan, ShortConvolution, StateSpaceDuality
from llmkit.onnx.context import GraphContext
from llmkit.onnx.gated import activation
from llmkit.onnx.graph import CONTRIB, Graph, Value
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.states import back_in_place, before_padding, past_state, present_state, real_tokens, short_convolution
from llmkit.onnx.weights import GraphWeights


def emit_short_convolution(
    kind: ShortConvolution, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    """A gated short convolution, [B, S, hidden]."""
    g = context.graph
    projected = weights.linear(before_padding(context, x), "in")
    b, c, u = g.op("Split", projected, g.ints(*[context.model.dims.hidden] * 3), n=3, axis=-1)
    y = short_convolution(context, weights, layer, g.op("Mul", b, u))
    return back_in_place(context, weights.linear(g.op("Mul", c, y), "out"))


def emit_selective_scan(
    kind: SelectiveScan, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    """Mamba, [B, S, hidden]."""
    g, extra = context.graph, context.model.dims.extra
    inner, n_state = extra["inner"], extra["state"]
    projected = weights.linear(before_padding(context, x), "in")
    u, gate = g.op("Split", projected, g.ints(inner, inner), n=2, axis=-1)
    u = activation(g, str(kind.act), short_convolution(context, weights, layer, u))
    sizes = g.ints(extra["dt_rank"], n_state, n_state)
    parts = list(g.op("Split", weights.linear(u, "x"), sizes, n=3, axis=-1))
    for i, (name, norm) in enumerate(kind.norms.items()):
        below = weights.under(name)
        parts[i] = emit_norm(norm, below, parts[i]) if kind.weighted else _plain_norm(g, norm, parts[i], below)
    step = g.op("Softplus", weights.single(weights.linear(parts[0], "dt")))
    step = g.op("Mul", step, real_tokens(context))
    u = weights.single(u)
    a = g.op("Neg", g.op("Exp", weights.single(weights.value("a_log"))))
    shape = [inner, n_state]
    held, y = g.op(
        "Scan", past_state(context, layer, "scan", shape), step, g.op("Mul", step, u),
        weights.single(parts[1]), weights.single(parts[2]),
        n=2, body=_token(g, a, shape), num_scan_inputs=4, scan_input_axes=[1] * 4, scan_output_axes=[1],
    )  # fmt: skip
    present_state(context, layer, "scan", held, shape)
    y = g.op("Add", y, g.op("Mul", u, weights.single(weights.value("d"))))
    y = g.op("Mul", y, activation(g, "silu", weights.single(gate)))
    return back_in_place(context, weights.linear(weights.computed(y), "out"))


def _token(outer: Graph, a: Value, shape: list[int]) -> Graph:
    """One token: (state, step, step u, B, C) -> (state, state C)."""
    body = Graph("token")
    inner, n_state = shape
    before = body.input("state", "FLOAT", ["batch_size", inner, n_state])
    step, added = (body.input(name, "FLOAT", ["batch_size", inner]) for name in ("step", "added"))
    b, c = (body.input(name, "FLOAT", ["batch_size", n_state]) for name in ("b", "c"))
    one, two = outer.ints(1), outer.ints(2)
    decay = body.op("Exp", body.op("Mul", body.op("Unsqueeze", step, two), a))
    new = body.op("Mul", body.op("Unsqueeze", added, two), body.op("Unsqueeze", b, one))
    state = body.op("Add", body.op("Mul", decay, before), new)
    y = body.op("Squeeze", body.op("MatMul", state, body.op("Unsqueeze", c, two)), two)
    body.output(state, "state_after", "FLOAT", ["batch_size", inner, n_state])
    body.output(y, "y", "FLOAT", ["batch_size", inner])
    return body


def emit_duality(
    kind: StateSpaceDuality, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    """Mamba 2, [B, S, hidden]."""
    g, extra = context.graph, context.model.dims.extra
    inner, heads, groups, n_state = (extra[name] for name in ("inner", "ssm_heads", "ssm_groups", "state"))
    keys, width = groups * n_state, inner // heads
    projected = weights.linear(before_padding(context, x), "in")
    factors = kind.multipliers if isinstance(kind.multipliers, tuple) else (1.0,) * 5
    parts = g.op("Split", projected, g.ints(inner, inner, keys, keys, heads), n=5, axis=-1)
    scaled = [
        part if factor == 1 else g.op("Mul", part, weights.number(factor))
        for part, factor in zip(parts, factors, strict=True)
    ]
    ubc = activation(
        g, str(kind.act), short_convolution(context, weights, layer, g.op("Concat", *scaled[1:4], axis=-1))
    )
    u, b, c = g.op("Split", weights.single(ubc), g.ints(inner, keys, keys), n=3, axis=-1)
    step = g.op("Softplus", g.op("Add", weights.single(scaled[4]), weights.single(weights.value("dt_bias"))))
    if isinstance(kind.limit, tuple):
        step = g.op("Clip", step, g.number(kind.limit[0]), g.number(kind.limit[1]))
    step = g.op("Mul", step, real_tokens(context))
    a = g.op("Neg", g.op("Exp", weights.single(weights.value("a_log"))))
    u = g.op("Reshape", u, g.ints(0, 0, heads, width))
    values = g.op("Mul", u, g.op("Unsqueeze", step, g.ints(3)))
    shape = [heads, n_state, width]
    y, held = g.op(
        "LinearAttention", _each_head(g, c, heads, groups, n_state), _each_head(g, b, heads, groups, n_state),
        g.op("Reshape", values, g.ints(0, 0, inner)), past_state(context, layer, "scan", shape), g.op("Mul", step, a),
        domain=CONTRIB, n=2, q_num_heads=heads, kv_num_heads=heads, scale=1.0, update_rule="gated",
    )  # fmt: skip
    present_state(context, layer, "scan", held, shape)
    d = g.op("Unsqueeze", weights.single(weights.value("d")), g.ints(1))
    y = g.op("Add", y, g.op("Reshape", g.op("Mul", u, d), g.ints(0, 0, inner)))
    y = _gated(kind, weights, y, activation(g, "silu", weights.single(scaled[0])), groups, inner)
    return back_in_place(context, weights.linear(weights.computed(y), "out"))


def _each_head(g: Graph, x: Any, heads: int, groups: int, size: int) -> Any:
    """[B, S, groups * size] repeated for the heads of each group: [B, S, heads * size]."""
    if heads == groups:
        return x
    split = g.op("Reshape", x, g.ints(0, 0, groups, 1, size))
    repeated = g.op("Tile", split, g.ints(1, 1, 1, heads // groups, 1))
    return g.op("Reshape", repeated, g.ints(0, 0, heads * size))


def _gated(kind: StateSpaceDuality, weights: GraphWeights, y: Any, gate: Any, groups: int, inner: int) -> Any:
    """The gate silu(z) and the norm over each group, float32."""
    g, norm = weights.graph, kind.gated_norm
    if norm is None:
        return g.op("Mul", y, gate)
    before = as_bool(kind.norm_before_gate)
    y = y if before else g.op("Mul", y, gate)
    split = g.op("Reshape", y, g.ints(0, 0, groups, inner // groups))
    normed = g.op("Reshape", _rms(g, norm, split), g.ints(0, 0, inner))
    y = g.op("Mul", normed, weights.single(weights.value("norm.weight")))
    return g.op("Mul", y, gate) if before else y


def _plain_norm(g: Graph, norm: RMSNorm, x: Any, weights: GraphWeights) -> Any:
    """RMS norm without a weight, in the compute dtype."""
    return weights.computed(_rms(g, norm, weights.single(x)))


def _rms(g: Graph, norm: RMSNorm, x: Any) -> Any:
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1))
    return g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.number(norm.epsilon))))
