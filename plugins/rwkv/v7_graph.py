"""RWKV-7's layer in ONNX: the recurrence is one Scan over the tokens, float32 in every compute dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.onnx.states import back_in_place, before_padding, past_state, present_state, real_tokens

from .graph import head_normed, shifted
from .v7_mix import MIXED, SLOWEST

if TYPE_CHECKING:
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.weights import GraphWeights

    from .v7_kind import GeneralizedDelta


def emit_layer(
    kind: GeneralizedDelta, context: GraphContext, weights: GraphWeights, layer: int, stream: Stream
) -> None:
    """One layer on the stream; its states are those of `mix.py`."""
    g, dims = context.graph, context.model.dims
    hidden, square = dims.hidden, [dims.heads, dims.head_dim, dims.head_dim]
    last_y, last_z = (past_state(context, layer, name, [hidden]) for name in ("last_time", "last_channel"))
    matrix = past_state(context, layer, "matrix", square)
    with g.scope("attn"):
        out, last_y, matrix = _time_mix(kind, context, weights, stream, last_y, matrix)
        stream.add(out)
    with g.scope("mlp"):
        mlp = weights.under("mlp")
        z = before_padding(context, stream.normed(kind.norm, weights.under("mlp_norm")))
        before, last_z = shifted(context, weights, z, last_z)
        mixed = g.op("Add", z, g.op("Mul", g.op("Sub", before, z), mlp.value("mix_k")))
        key = g.op("Relu", mlp.linear(mixed, "key"))
        stream.add(back_in_place(context, mlp.linear(g.op("Mul", key, key), "value")))
    for name, after in (("last_time", last_y), ("last_channel", last_z)):
        present_state(context, layer, name, after, [hidden])
    present_state(context, layer, "matrix", matrix, square)


def _time_mix(
    kind: GeneralizedDelta, context: GraphContext, weights: GraphWeights, stream: Stream, last: Any, matrix: Any
) -> tuple[Any, Any, Any]:
    g, attn, dims = context.graph, weights.under("attn"), context.model.dims
    y = before_padding(context, stream.normed(kind.norm, weights.under("attn_norm")))
    before, last = shifted(context, weights, y, last)
    change = g.op("Sub", before, y)
    mixed = {n: g.op("Add", y, g.op("Mul", change, attn.value(f"mix_{n}"))) for n in MIXED}
    r, k, v = (attn.linear(mixed[name], name) for name in ("r", "k", "v"))

    def low_rank(name: str, between: str | None) -> Any:
        down = attn.linear(mixed[name], f"{name}_down")
        return attn.linear(g.op(between, down) if between else down, f"{name}_up")

    def heads(x: Any) -> Any:
        return g.op("Reshape", x, g.ints(0, 0, dims.heads, dims.head_dim))

    pace = g.op("Sigmoid", weights.single(low_rank("w", "Tanh")))
    decay = g.op("Exp", g.op("Mul", pace, g.number(-SLOWEST)))
    rate, gate = g.op("Sigmoid", low_rank("a", None)), low_rank("g", "Sigmoid")
    scaled = heads(g.op("Mul", k, attn.value("k_k")))
    length = g.op("Max", g.op("ReduceL2", scaled, g.ints(-1)), weights.number(1e-12))
    unit, one = g.op("Div", scaled, length), weights.number(1.0)
    k = g.op("Mul", k, g.op("Add", one, g.op("Mul", g.op("Sub", rate, one), attn.value("k_a"))))
    first = context.once("first values", lambda: v)
    if not kind.is_first:
        share = g.op("Sigmoid", low_rank("v", None))
        v = g.op("Add", v, g.op("Mul", g.op("Sub", first, v), share))
    rated = g.op("Mul", unit, heads(rate))
    tokens = [weights.single(x) for x in (heads(r), heads(decay), heads(k), heads(v), unit, rated)]
    matrix, out = g.op(
        "Scan", matrix, *tokens, real_tokens(context),
        n=2, body=_body(dims.heads, dims.head_dim), num_scan_inputs=7, scan_input_axes=[1] * 7, scan_output_axes=[1],
    )  # fmt: skip
    flat = head_normed(kind.head_norm, attn, out)
    again = g.op("ReduceSum", g.op("Mul", g.op("Mul", heads(r), heads(k)), attn.value("r_k")), g.ints(-1))
    flat = g.op("Add", flat, g.op("Reshape", g.op("Mul", again, heads(v)), g.ints(0, 0, dims.hidden)))
    return back_in_place(context, attn.linear(g.op("Mul", flat, gate), "o")), last, matrix


def _body(n_heads: int, width: int) -> Any:
    """One token: (state [B, heads, width, width], r, decay, k, v, unit, unit * rate, real) -> (state, what is read)."""
    from llmkit.onnx.graph import Graph

    b = Graph("token")
    square: list[int | str] = ["batch_size", n_heads, width, width]
    state = b.input("state", "FLOAT", square)
    names = ("r", "decay", "k", "v", "unit", "rated")
    r, decay, k, v, unit, rated = (b.input(name, "FLOAT", ["batch_size", n_heads, width]) for name in names)
    real = b.op("Reshape", b.cast(b.input("real", "FLOAT", ["batch_size", 1]), "BOOL"), b.ints(-1, 1, 1, 1))
    r, v, unit = (b.op("Unsqueeze", x, b.ints(3)) for x in (r, v, unit))  # columns
    decay, k, rated = (b.op("Unsqueeze", x, b.ints(2)) for x in (decay, k, rated))  # rows
    read = b.op("Mul", b.op("MatMul", state, unit), rated)
    after = b.op("Add", b.op("Sub", b.op("Mul", state, decay), read), b.op("Mul", v, k))
    after = b.op("Where", real, after, state)
    b.output(after, "after", "FLOAT", square)
    b.output(b.op("Squeeze", b.op("MatMul", after, r), b.ints(3)), "out", "FLOAT", ["batch_size", n_heads, width])
    return b
