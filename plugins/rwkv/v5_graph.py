"""RWKV-5's and RWKV-6's layer in ONNX: the recurrence is one Scan over the tokens, float32 in every compute dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.onnx.gated import activation
from llmkit.onnx.states import back_in_place, before_padding, past_state, present_state, real_tokens

from .graph import head_normed, shifted

if TYPE_CHECKING:
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.weights import GraphWeights

    from .v5_kind import Eagle


def emit_layer(kind: Eagle, context: GraphContext, weights: GraphWeights, layer: int, stream: Stream) -> None:
    """One layer on the stream; its states are those of `v5_mix.py`."""
    g, dims = context.graph, context.model.dims
    hidden, square = dims.hidden, [dims.heads, dims.head_dim, dims.head_dim]
    last_y, last_z = (past_state(context, layer, name, [hidden]) for name in ("last_time", "last_channel"))
    with g.scope("attn"):
        attn = weights.under("attn")
        y = before_padding(context, stream.normed(kind.norm, weights.under("attn_norm")))
        before, last_y = shifted(context, weights, y, last_y)
        given, decay = (_by_token if kind.is_by_token else _fixed)(kind, attn, y, g.op("Sub", before, y))
        r, k, v = (weights.single(attn.linear(given[name], name)) for name in ("r", "k", "v"))
        decay = g.op("Expand", decay, g.op("Shape", k))
        tokens = [g.op("Reshape", x, g.ints(0, 0, dims.heads, dims.head_dim)) for x in (r, k, v, decay)]
        matrix, out = g.op(
            "Scan", past_state(context, layer, "matrix", square), *tokens, real_tokens(context), n=2,
            body=_body(weights.single(g.op("Unsqueeze", attn.value("first"), g.ints(2))), dims.heads, dims.head_dim),
            num_scan_inputs=5, scan_input_axes=[1] * 5, scan_output_axes=[1],
        )  # fmt: skip
        present_state(context, layer, "matrix", matrix, square)
        out = g.op("Mul", head_normed(kind.head_norm, attn, out), activation(g, "silu", attn.linear(given["g"], "g")))
        stream.add(back_in_place(context, attn.linear(out, "o")))
    with g.scope("mlp"):
        mlp = weights.under("mlp")
        z = before_padding(context, stream.normed(kind.norm, weights.under("mlp_norm")))
        before, last_z = shifted(context, weights, z, last_z)
        change = g.op("Sub", before, z)
        key = g.op("Relu", mlp.linear(_mixed(z, change, _share(kind, mlp, "mix_k"), g), "key"))
        gate = g.op("Sigmoid", mlp.linear(_mixed(z, change, _share(kind, mlp, "mix_r"), g), "receptance"))
        stream.add(back_in_place(context, g.op("Mul", gate, mlp.linear(g.op("Mul", key, key), "value"))))
    for name, after in (("last_time", last_y), ("last_channel", last_z)):
        present_state(context, layer, name, after, [hidden])


def _mixed(y: Any, change: Any, share: Any, g: Any) -> Any:
    return g.op("Add", y, g.op("Mul", change, share))


def _share(kind: Eagle, weights: GraphWeights, name: str) -> Any:
    stored = weights.value(name)
    return stored if kind.is_by_token else weights.graph.op("Sub", weights.number(1.0), stored)


def _fixed(kind: Eagle, attn: GraphWeights, y: Any, change: Any) -> tuple[dict[str, Any], Any]:
    """What each matrix is given, and the decays, [1, 1, hidden]."""
    g = attn.graph
    decay = g.op("Reshape", attn.single(attn.value("decay")), g.ints(1, 1, -1))
    return {name: _mixed(y, change, _share(kind, attn, f"mix_{name}"), g) for name in kind.mixed}, _paced(g, decay)


def _by_token(kind: Eagle, attn: GraphWeights, y: Any, change: Any) -> tuple[dict[str, Any], Any]:
    """The same, the decays [B, S, hidden]."""
    g, n = attn.graph, len(kind.mixed)
    low = g.op("Tanh", g.op("MatMul", _mixed(y, change, attn.value("mix_x"), g), attn.value("mix_down")))
    low = g.op("Transpose", g.op("Reshape", low, g.ints(0, 0, n, -1)), perm=[2, 0, 1, 3])
    shifts = g.op("MatMul", low, g.op("Unsqueeze", attn.value("mix_up"), g.ints(1)))
    given = {}
    for name, shift in zip(kind.mixed, g.op("Split", shifts, g.ints(*[1] * n), n=n, axis=0), strict=True):
        share = g.op("Add", attn.value(f"mix_{name}"), g.op("Squeeze", shift, g.ints(0)))
        given[name] = _mixed(y, change, share, g)
    decay = g.op("MatMul", g.op("Tanh", g.op("MatMul", given["w"], attn.value("decay_down"))), attn.value("decay_up"))
    return given, _paced(g, g.op("Add", attn.single(attn.value("decay")), attn.single(decay)))


def _paced(g: Any, decay: Any) -> Any:
    return g.op("Exp", g.op("Neg", g.op("Exp", decay)))


def _body(first: Any, n_heads: int, width: int) -> Any:
    """One token: (state [B, heads, width, width], r, k, v, decay, real) -> (state, what is read)."""
    from llmkit.onnx.graph import Graph

    b = Graph("token")
    square: list[int | str] = ["batch_size", n_heads, width, width]
    state = b.input("state", "FLOAT", square)
    r, k, v, decay = (b.input(name, "FLOAT", ["batch_size", n_heads, width]) for name in ("r", "k", "v", "decay"))
    real = b.op("Reshape", b.cast(b.input("real", "FLOAT", ["batch_size", 1]), "BOOL"), b.ints(-1, 1, 1, 1))
    r, v = (b.op("Unsqueeze", x, b.ints(2)) for x in (r, v))  # rows
    k, decay = (b.op("Unsqueeze", x, b.ints(3)) for x in (k, decay))  # columns
    new = b.op("Mul", k, v)
    read = b.op("MatMul", r, b.op("Add", state, b.op("Mul", first, new)))
    after = b.op("Where", real, b.op("Add", b.op("Mul", state, decay), new), state)
    b.output(after, "after", "FLOAT", square)
    b.output(b.op("Squeeze", read, b.ints(2)), "out", "FLOAT", ["batch_size", n_heads, width])
    return b
