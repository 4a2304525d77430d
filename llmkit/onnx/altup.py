"""The graph reader of alternating updates: the stream is [B, S, streams * hidden]."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.altup import AltUpBlock
from llmkit.architecture.hooks import GraphFunction
from llmkit.lazy_imports import np
from llmkit.onnx.context import GraphContext
from llmkit.onnx.norms import Stream, emit_norm
from llmkit.onnx.weights import GraphWeights


def emit_altup(
    block: AltUpBlock,
    context: GraphContext,
    weights: GraphWeights,
    stream: Stream,
    attention: GraphFunction,
    mlp: GraphFunction,
    gate: Any,
) -> None:
    """One layer on all streams.

    Args:
        gate: makes of [B, S, hidden] what is added to the streams after the first.
    """
    g, n, hidden, own = context.graph, block.streams, context.model.dims.hidden, weights.under("altup")

    def norm(name: str, x: Any) -> Any:
        return emit_norm(block.norm, weights.under(name), x)

    def modalities(x: Any) -> Any:
        scaled = g.op("Mul", norm("altup.router_norm", x), weights.number(1.0 / hidden))
        return g.op("Tanh", own.linear(scaled, "router"))

    def active(streams: Any) -> Any:
        return g.op("Squeeze", g.op("Gather", streams, g.ints(block.index), axis=2), g.ints(2))

    h = g.op("Reshape", stream.value(), g.ints(0, 0, n, hidden))
    matrix = g.op("Reshape", own.linear(modalities(active(h)), "predict"), g.ints(0, 0, n, n))
    h = g.op("Add", h, g.op("MatMul", matrix, h))
    one = active(h)
    z = norm("attn_norm", one)
    branch = norm("laurel.norm", weights.linear(weights.linear(z, "laurel.left"), "laurel.right"))
    y = g.op("Sum", one, norm("attn_post_norm", attention(z)), z, branch)
    y = g.op("Mul", y, weights.number(2.0**-0.5))
    y = g.op("Add", y, norm("mlp_post_norm", mlp(norm("mlp_norm", y))))
    shares = g.op("Add", own.linear(modalities(y), "correct"), weights.number(1.0))
    innovation = g.op("Unsqueeze", g.op("Sub", y, one), g.ints(2))
    h = g.op("Add", h, g.op("Mul", g.op("Unsqueeze", shares, g.ints(3)), innovation))
    seen = g.op("Mul", active(h), own.value("scale")) if block.scales_output else active(h)
    others = weights.computed(g.constant(np.array([[0.0]] + [[1.0]] * (n - 1), dtype=np.float32)))
    h = g.op("Add", h, g.op("Mul", g.op("Unsqueeze", gate(seen), g.ints(2)), others))
    stream.replace(g.op("Reshape", h, g.ints(0, 0, n * hidden)))
