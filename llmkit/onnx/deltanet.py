"""The graph reader of the gated delta rule's kind: the recurrence is ONNX Runtime's LinearAttention, in float32.

The CPU kernel (onnxruntime/contrib_ops/cpu/bert/linear_attention.cc) goes token by token; others take chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.architecture.deltanet import NORM_EPS, GatedDeltaNet, KimiDeltaAttention
from llmkit.lazy_imports import np
from llmkit.onnx.context import GraphContext
from llmkit.onnx.gated import activation
from llmkit.onnx.graph import CONTRIB
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.states import back_in_place, before_padding, past_state, present_state, real_tokens, short_convolution
from llmkit.onnx.weights import GraphWeights


def emit_gated_delta_net(
    kind: GatedDeltaNet, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    """X [B, S, hidden] -> [B, S, hidden]; the states are those of `llmkit/decoder/deltanet.py`."""
    g = context.graph
    *mixed, z = weights.project(x, ("in_q", "in_k", "in_v", "in_b", "in_a", "in_z"))
    y = _rule(kind, context, weights, layer, mixed)
    gate = activation(g, "silu", weights.single(z))
    return weights.linear(weights.computed(g.op("Mul", weights.single(y), gate)), "out")


def emit_kimi_delta_attention(
    kind: KimiDeltaAttention,
    context: GraphContext,
    weights: GraphWeights,
    layer: int,
    positions: GraphPositions,
    x: Any,
) -> Any:
    """The same layer where each channel has a decay."""
    g = context.graph
    *mixed, decay, gate = weights.project(x, ("q", "k", "v", "rate", "decay_a", "gate_a"))
    y = _rule(kind, context, weights, layer, [*mixed, weights.linear(decay, "decay_b")])
    gate = g.op("Sigmoid", weights.single(weights.linear(gate, "gate_b")))
    return weights.linear(weights.computed(g.op("Mul", weights.single(y), gate)), "o")


def _rule(kind: GatedDeltaNet, context: GraphContext, weights: GraphWeights, layer: int, parts: Sequence[Any]) -> Any:
    """The normed heads that the rule makes of q, k, v, b and a, [B, S, value_heads * value_dim]."""
    g, sizes = context.graph, context.model.dims.extra
    n_keys, n_values = sizes["delta_key_heads"], sizes["delta_value_heads"]
    key_dim, value_dim = sizes["delta_key_dim"], sizes["delta_value_dim"]
    (n_decays,) = weights.slot("dt_bias").shape
    mixed, b, a = g.op(
        "Split",
        before_padding(context, g.op("Concat", *parts, axis=-1)),
        g.ints(2 * n_keys * key_dim + n_values * value_dim, n_values, n_decays),
        n=3,
        axis=-1,
    )
    mixed = activation(
        g, str(kind.act), short_convolution(context, weights, layer, mixed, "conv_q", "conv_k", "conv_v")
    )
    widths = g.ints(n_keys * key_dim, n_keys * key_dim, n_values * value_dim)
    q, k, v = g.op("Split", weights.single(mixed), widths, n=3, axis=-1)

    def unit(part: Any, scale: float) -> Any:
        """Heads of L2 norm `scale`: x / sqrt(sum x^2 + eps), as a norm by the mean; one for each value head."""
        weight = g.constant(np.full(key_dim, scale * key_dim**-0.5, dtype=np.float32))
        heads = g.op("Reshape", part, g.ints(0, 0, n_keys, key_dim))
        heads = g.op("RMSNormalization", heads, weight, axis=-1, epsilon=NORM_EPS / key_dim)
        if n_keys != n_values:
            heads = g.op("Unsqueeze", heads, g.ints(3))
            heads = g.op("Expand", heads, g.ints(1, 1, 1, n_values // n_keys, 1))
        return g.op("Reshape", heads, g.ints(0, 0, n_values * key_dim))

    real = real_tokens(context)
    shift, slope = (weights.single(weights.value(name)) for name in ("dt_bias", "A_log"))
    slope = g.op("Neg", g.op("Exp", slope))
    if n_decays != n_values:  # of a head, for each of its channels
        slope = g.op("Expand", g.op("Reshape", slope, g.ints(n_values, 1)), g.ints(n_values, n_decays // n_values))
        slope = g.op("Reshape", slope, g.ints(-1))
    pace = g.op("Softplus", g.op("Add", weights.single(a), shift))
    decay = g.op("Mul", g.op("Mul", pace, slope), real)
    rate = g.op("Mul", weights.single(g.op("Sigmoid", b)), real)
    shape = [n_values, key_dim, value_dim]
    past = past_state(context, layer, "matrix", shape)
    y, matrix = g.op(
        "LinearAttention", unit(q, key_dim**-0.5), unit(k, 1.0), v, past, decay, rate,
        domain=CONTRIB, n=2, q_num_heads=n_values, kv_num_heads=n_values, scale=1.0, update_rule="gated_delta",
    )  # fmt: skip
    present_state(context, layer, "matrix", matrix, shape)
    heads = g.op("Reshape", back_in_place(context, weights.computed(y)), g.ints(0, 0, n_values, value_dim))
    return g.op("Reshape", emit_norm(kind.norm, weights.under("out_norm"), heads), g.ints(0, 0, n_values * value_dim))
