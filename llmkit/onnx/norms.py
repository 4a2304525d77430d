"""The graph reader of the norm kinds, and the stream of hidden states that norms and branches share."""

from __future__ import annotations

from typing import cast

from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import LayerNorm, NoNorm, RMSNorm
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
        if self._branch is None or not isinstance(kind, RMSNorm | LayerNorm):
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
    weight = weights.value("weight")
    return weights.graph.op("Add", weight, weights.number(kind.offset)) if kind.offset else weight


def _rms(kind: RMSNorm, weights: GraphWeights, x: Value) -> Value:
    normed: Value = weights.graph.op("RMSNormalization", x, _weight(kind, weights), axis=-1, epsilon=kind.epsilon)
    return normed


def _layer_norm(kind: LayerNorm, weights: GraphWeights, x: Value) -> Value:
    bias = weights.value("bias") if weights.has("bias") else None
    normed: Value = weights.graph.op(
        "LayerNormalization", x, _weight(kind, weights), bias, axis=-1, epsilon=kind.epsilon
    )
    return normed


def _none(kind: NoNorm, weights: GraphWeights, x: Value) -> Value:
    return x


_EMITTERS: Hooks[Value] = {RMSNorm: _rms, LayerNorm: _layer_norm, NoNorm: _none}
