"""The graph reader of the norm kinds, and the stream of hidden states that norms and branches share."""

from __future__ import annotations

from typing import Any, cast

from llmkit.architecture.altup import LEAST_SQUARE, AltUpNorm
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import HeadNorm, LayerNorm, NoNorm, RMSNorm, UnitRMS
from llmkit.architecture.layer_inputs import HiddenNorm
from llmkit.lazy_imports import np
from llmkit.onnx.graph import CONTRIB, Value
from llmkit.onnx.weights import GraphWeights


def emit_norm(kind: Kind, weights: GraphWeights, x: Value) -> Value:
    """X [..., width] normed over its last dimension."""
    return emitter_of(kind, _EMITTERS)(weights, x)


class Stream:
    """The residual stream. The last branch is added late: a norm that follows is then one op with the addition."""

    def __init__(self, weights: GraphWeights, value: Value) -> None:
        self._graph = weights.graph
        self._value = value
        self._branch: Value | None = None

    def add(self, branch: Value) -> None:
        """Add a branch [B, S, hidden]."""
        if self._branch is not None:
            self._value = self._graph.op("Add", self._value, self._branch)
        self._branch = branch

    def value(self) -> Value:
        """The hidden states as they are now."""
        if self._branch is not None:
            self._value, self._branch = self._graph.op("Add", self._value, self._branch), None
        return self._value

    def replace(self, value: Value) -> None:
        """Go on from another value."""
        self._value, self._branch = value, None

    def normed(self, kind: Kind, weights: GraphWeights) -> Value:
        """The hidden states normed; they stay as they are."""
        if self._branch is None or not isinstance(kind, RMSNorm | LayerNorm) or isinstance(kind, AltUpNorm):
            return emit_norm(kind, weights, self.value())
        branch, self._branch = self._branch, None
        if isinstance(kind, RMSNorm):
            op, parameters = "SkipSimplifiedLayerNormalization", [_weight(kind, weights)]
        else:
            op, parameters = "SkipLayerNormalization", [_weight(kind, weights)]
            parameters += [weights.value("bias")] if weights.has("bias") else []
        out, mean, deviation, self._value = self._graph.op(
            op, self._value, branch, *parameters, domain=CONTRIB, n=4, epsilon=kind.epsilon
        )
        mean.name = deviation.name = ""  # outputs that nothing reads are left out
        return cast("Value", out)


def _weight(kind: RMSNorm | LayerNorm, weights: GraphWeights) -> Value:
    if not weights.has("weight"):
        return _ones(weights, weights.model.dims.evaluate(kind.width))
    weight = weights.value("weight")
    return weights.graph.op("Add", weight, weights.number(kind.offset)) if kind.offset else weight


def _ones(weights: GraphWeights, size: int) -> Value:
    return weights.computed(weights.graph.constant(np.ones(size, dtype=np.float32)))


def _rms(kind: RMSNorm, weights: GraphWeights, x: Value) -> Value:
    normed: Value = weights.graph.op("RMSNormalization", x, _weight(kind, weights), axis=-1, epsilon=kind.epsilon)
    return normed


def _layer_norm(kind: LayerNorm, weights: GraphWeights, x: Value) -> Value:
    bias = weights.value("bias") if weights.has("bias") else None
    normed: Value = weights.graph.op(
        "LayerNormalization", x, _weight(kind, weights), bias, axis=-1, epsilon=kind.epsilon
    )
    return normed


def _head_norm(kind: HeadNorm, weights: GraphWeights, x: Value) -> Value:
    g, size = weights.graph, weights.model.dims.head_dim
    scale = weights.value(kind.leaves[0])
    if kind.is_apart:
        scale = g.op("Concat", scale, *(weights.value(leaf) for leaf in kind.leaves[1:]), axis=0)
        scale = g.op("Reshape", scale, g.ints(-1, size))
    unit = g.op("LayerNormalization", x, _ones(weights, size), axis=-1, epsilon=kind.epsilon)
    normed: Value = g.op("Mul", unit, scale)
    return normed


def _unit_rms(kind: UnitRMS, weights: GraphWeights, x: Value) -> Value:
    normed: Value = weights.graph.op("RMSNormalization", x, weights.number(1.0), axis=-1, epsilon=kind.epsilon)
    return normed


def _none(kind: NoNorm, weights: GraphWeights, x: Value) -> Value:
    return x


def emit_as_long(weights: GraphWeights, x: Any, first: Any) -> Any:
    """X [..., hidden] rescaled to the L2 norm of `first`, row by row."""
    g = weights.graph

    def square(x: Any) -> Any:
        return g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)

    length = g.op("Sqrt", g.op("Max", square(x), weights.number(LEAST_SQUARE)))
    return g.op("Div", g.op("Mul", x, g.op("Sqrt", square(first))), length)


def _altup_norm(kind: AltUpNorm, weights: GraphWeights, x: Any) -> Value:
    g, n, hidden = weights.graph, kind.streams, weights.model.dims.hidden
    first, *rest = g.op("Split", x, g.ints(*[hidden] * n), n=n, axis=-1)
    parts = [emit_as_long(weights, weights.linear(part, f"stream.{i + 1}"), first) for i, part in enumerate(rest)]
    return _rms(kind, weights, g.op("Div", g.op("Sum", first, *parts), weights.number(float(n))))


_EMITTERS: Hooks[Value] = {
    AltUpNorm: _altup_norm,
    HeadNorm: _head_norm,
    HiddenNorm: _rms,
    RMSNorm: _rms,
    LayerNorm: _layer_norm,
    NoNorm: _none,
    UnitRMS: _unit_rms,
}
