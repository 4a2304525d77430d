"""The graph reader of MLPs, of residual wirings and of whole layers."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.activations import LAPLACE_DEVIATION, LAPLACE_MEAN, QUICK_GELU_SLOPE, known_activation
from llmkit.architecture.hooks import GraphFunction, Hooks, emitter_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import (
    Block,
    GatedMLP,
    OutputNorm,
    Parallel,
    PlainMLP,
    PostNorm,
    PreNorm,
    Sandwich,
    SharedParallel,
)
from llmkit.onnx.attention import emit_attention
from llmkit.onnx.context import GraphContext
from llmkit.onnx.graph import CONTRIB, Graph, Value
from llmkit.onnx.norms import Stream, emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.weights import GraphWeights

_CONTRIBUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),
    "quick_gelu": ("QuickGelu", {"alpha": QUICK_GELU_SLOPE}),
    "gelu_pytorch_tanh": ("FastGelu", {}),
    "gelu": ("Gelu", {}),
}
_STANDARD: dict[str, tuple[str, dict[str, Any]]] = {
    "hardswish": ("HardSwish", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "mish": ("Mish", {}),
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
}


def emit_layer(
    block: Kind, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
) -> None:
    """One layer on the stream of hidden states."""
    emitter_of(block, _BLOCKS)(context, weights, layer, positions, stream)


def _attention_block(
    block: Block, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
) -> None:
    def scaled(x: Any) -> Any:
        scale = block.branch_scale
        return x if scale is None else context.graph.op("Mul", x, weights.number(scale))

    def attention(x: Any) -> Any:
        with context.graph.scope("attn"):
            return scaled(emit_attention(block.attention, context, weights.under("attn"), layer, positions, x))

    def mlp(x: Any) -> Any:
        with context.graph.scope("mlp"):
            return scaled(emitter_of(block.mlp, _MLPS)(weights.under("mlp"), x))

    emitter_of(block.residual, _RESIDUALS)(block.norm, weights, stream, attention, mlp)


def activation(graph: Graph, name: str, x: Any) -> Any:
    """The activation that configs call `name`.

    Raises:
        RequirementError: unknown name.
    """
    g, function = graph, known_activation(name)
    if function in _CONTRIBUTED:
        op, attributes = _CONTRIBUTED[function]
        return g.op(op, x, domain=CONTRIB, **attributes)
    if function in _STANDARD:
        op, attributes = _STANDARD[function]
        return g.op(op, x, **attributes)
    match function:
        case "linear":
            return x
        case "gelu_10":
            return g.op("Clip", g.op("Gelu", x, domain=CONTRIB), _like(g, -10, x), _like(g, 10, x))
        case "relu2":
            positive = g.op("Relu", x)
            return g.op("Mul", positive, positive)
        case "relu6":
            return g.op("Clip", x, _like(g, 0, x), _like(g, 6, x))
        case "sqrtsoftplus":
            return g.op("Sqrt", g.op("Softplus", x))
    spread = _like(g, LAPLACE_DEVIATION * 2**0.5, x)
    erf = g.op("Erf", g.op("Div", g.op("Sub", x, _like(g, LAPLACE_MEAN, x)), spread))
    return g.op("Mul", g.op("Add", erf, _like(g, 1, x)), _like(g, 0.5, x))


def _like(g: Graph, number: float, x: Any) -> Any:
    """A scalar in the element type of `x`."""
    return g.op("CastLike", g.number(number), x)


def _gated(kind: GatedMLP, weights: GraphWeights, x: Any) -> Any:
    g = weights.graph
    gate, up = weights.project(x, ("gate", "up"))
    return weights.linear(g.op("Mul", activation(g, str(kind.act), gate), up), "down")


def _plain(kind: PlainMLP, weights: GraphWeights, x: Any) -> Any:
    return weights.linear(activation(weights.graph, str(kind.act), weights.linear(x, "up")), "down")


def _pre_norm(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    stream.add(attention(stream.normed(norm, weights.under("attn_norm"))))
    stream.add(mlp(stream.normed(norm, weights.under("mlp_norm"))))


def _post_norm(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    stream.add(attention(stream.value()))
    stream.replace(stream.normed(norm, weights.under("attn_norm")))
    stream.add(mlp(stream.value()))
    stream.replace(stream.normed(norm, weights.under("mlp_norm")))


def _output_norm(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    stream.add(emit_norm(norm, weights.under("attn_post_norm"), attention(stream.value())))
    stream.add(emit_norm(norm, weights.under("mlp_post_norm"), mlp(stream.value())))


def _parallel(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    one = stream.normed(norm, weights.under("attn_norm"))
    other = emit_norm(norm, weights.under("mlp_norm"), stream.value())
    stream.add(attention(one))
    stream.add(mlp(other))


def _shared_parallel(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    y = stream.normed(norm, weights.under("attn_norm"))
    stream.add(attention(y))
    stream.add(mlp(y))


def _sandwich(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    out = attention(stream.normed(norm, weights.under("attn_norm")))
    stream.add(emit_norm(norm, weights.under("attn_post_norm"), out))
    out = mlp(stream.normed(norm, weights.under("mlp_norm")))
    stream.add(emit_norm(norm, weights.under("mlp_post_norm"), out))


_MLPS: Hooks[Value] = {GatedMLP: _gated, PlainMLP: _plain}
_RESIDUALS: Hooks[None] = {
    PreNorm: _pre_norm,
    PostNorm: _post_norm,
    OutputNorm: _output_norm,
    Parallel: _parallel,
    SharedParallel: _shared_parallel,
    Sandwich: _sandwich,
}
_BLOCKS: Hooks[None] = {Block: _attention_block}
