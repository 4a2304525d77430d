"""Activations of a graph, and the gated MLP: alone, and as what all tokens share beside experts."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.activations import LAPLACE_DEVIATION, LAPLACE_MEAN, QUICK_GELU_SLOPE, known_activation
from llmkit.architecture.altup import GaussianTopK
from llmkit.architecture.experts import ClampedSwiGLU
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.keys import as_float
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import GatedMLP
from llmkit.onnx.graph import CONTRIB, Graph, Value
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


def gated_mlp(kind: GatedMLP, weights: GraphWeights, x: Any) -> Any:
    """The gated MLP made of `gate`, `up` and `down` of the weights, with the activation of the kind."""
    g = weights.graph
    gate, up = weights.project(x, ("gate", "up"))
    if not isinstance(kind.multipliers, tuple):
        return weights.linear(gated_product(g, kind.act, gate, up), "down")
    of_gate, of_all = (weights.number(factor) for factor in kind.multipliers)
    y = weights.linear(gated_product(g, kind.act, g.op("Mul", gate, of_gate), up), "down")
    return g.op("Mul", y, of_all)


def gated_product(g: Graph, act: str | Kind, gate: Any, up: Any) -> Any:
    """What goes into `down`.

    Raises:
        RequirementError: unknown activation.
    """
    if isinstance(act, Kind):
        return emitter_of(act, _PRODUCTS)(g, gate, up)
    return g.op("Mul", activation(g, act, gate), up)


def _clamped(kind: ClampedSwiGLU, g: Graph, gate: Any, up: Any) -> Any:
    limit, below = _like(g, as_float(kind.limit), gate), _like(g, -as_float(kind.limit), gate)
    swish = g.op("QuickGelu", g.op("Clip", gate, None, limit), domain=CONTRIB, alpha=as_float(kind.alpha))
    return g.op("Mul", g.op("Add", g.op("Clip", up, below, limit), _like(g, 1, gate)), swish)


def _gaussian_top_k(kind: GaussianTopK, g: Graph, gate: Any, up: Any) -> Any:
    apart = g.op("Sub", gate, g.op("ReduceMean", gate, g.ints(-1), keepdims=1))
    std = g.op("Sqrt", g.op("ReduceMean", g.op("Mul", apart, apart), g.ints(-1), keepdims=1))
    kept = g.op("Relu", g.op("Sub", apart, g.op("Mul", std, _like(g, kind.quantile, gate))))
    return g.op("Mul", activation(g, str(kind.act), kept), up)


_PRODUCTS: Hooks[Value] = {ClampedSwiGLU: _clamped, GaussianTopK: _gaussian_top_k}
"""Activations that are kinds."""
