"""The graph reader of the attention kinds: one fused op, whichever ONNX Runtime computes best.

`attention` is the standard op of opset 23: any head size, padding on either side, any chunk. `gqa` is ONNX Runtime's
GroupQueryAttention, whose cache may be a buffer that is written in place; `flash` is the same op without a mask that is
added to the scores, which is what the flash kernels of CUDA take: padding follows the tokens of a row then. `mha` is
its MultiHeadAttention, which every version and provider has, for models whose query heads all have keys of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.architecture.attention import ScoreRule
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import GroupedQuery
from llmkit.errors import RequirementError
from llmkit.onnx.context import GraphContext
from llmkit.onnx.graph import CONTRIB, Value
from llmkit.onnx.masks import score_bias
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.weights import GraphWeights

_FLASH_HEAD = 256  # the largest head of the kernels


def emit_attention(
    kind: Kind, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Value
) -> Value:
    """The attention of one layer: x [B, S, hidden] -> [B, S, hidden].

    Raises:
        RequirementError: no emitter for the kind, or the chosen op cannot compute it.
    """
    return emitter_of(kind, _EMITTERS)(context, weights, layer, positions, x)


def _grouped_query(
    kind: GroupedQuery, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    dims = context.model.dims
    q, k, v = weights.project(x, ("q", "k", "v"))
    if kind.norms is not None:
        q = _head_norm(kind.norms[0], weights.under("q_norm"), q, dims.heads, dims.head_dim)
        k = _head_norm(kind.norms[1], weights.under("k_norm"), k, dims.kv_heads, dims.head_dim)
    q, k = positions.rotate(context, q, dims.heads), positions.rotate(context, k, dims.kv_heads)
    rule = kind.score_rule(dims.head_dim)
    return weights.linear(_OPS[context.attention](context, layer, (q, k, v), positions, rule), "o")


def _head_norm(kind: Kind, weights: GraphWeights, x: Any, heads: int, size: int) -> Any:
    g = weights.graph
    split = g.op("Reshape", x, g.ints(0, 0, heads, size))
    return g.op("Reshape", emit_norm(kind, weights, split), g.ints(0, 0, heads * size))


def _cache(context: GraphContext, layer: int) -> tuple[Any, Any]:
    """The inputs that hold past keys and values, [B, kv_heads, P, head_dim]."""
    dims = context.model.dims
    shape: list[int | str] = ["batch_size", dims.kv_heads, "past_sequence_length", dims.head_dim]
    names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    past = [context.graph.input(name, context.cache_dtype, shape) for name in names]
    return past[0], past[1]


def _present(context: GraphContext, layer: int, key: Any, value: Any) -> None:
    dims = context.model.dims
    shape: list[int | str] = ["batch_size", dims.kv_heads, "total_sequence_length", dims.head_dim]
    for part, value_out in (("key", key), ("value", value)):
        context.graph.output(value_out, f"present.{layer}.{part}", context.cache_dtype, shape)
        context.state[f"past_key_values.{layer}.{part}"] = f"present.{layer}.{part}"


def _attention(
    context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: ScoreRule
) -> Any:
    past = _cache(context, layer)
    has_prefix = positions.prefix(context) is not None
    bias = score_bias(context, positions, rule.window, causal=has_prefix)
    out, key, value = context.graph.op(
        "Attention", *qkv, bias, *past,
        n=3,
        is_causal=int(not has_prefix),
        q_num_heads=context.model.dims.heads,
        kv_num_heads=context.model.dims.kv_heads,
        scale=rule.scale,
        softcap=rule.softcap,
    )  # fmt: skip
    _present(context, layer, key, value)
    return out


def _gqa(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: ScoreRule) -> Any:
    dims = context.model.dims
    if dims.head_dim % 8:
        other = "leave --kv-cache-dtype out" if context.cache is not None else "export with --attention attention"
        raise RequirementError(
            f"GroupQueryAttention needs a head size that 8 divides, found {dims.head_dim}", hint=other
        )
    past = _cache(context, layer)
    has_prefix = positions.prefix(context) is not None
    bias = score_bias(context, positions, rule.window, causal=has_prefix)
    lengths, total = context.once("gqa lengths", lambda: _lengths(context))
    inputs = [*qkv, *past, lengths, total, None, None, None, bias]
    return _grouped(context, layer, inputs, scale=rule.scale, softcap=rule.softcap, causal=0 if has_prefix else None)


def _grouped(context: GraphContext, layer: int, inputs: list[Any], **attributes: Any) -> Any:
    """GroupQueryAttention; where its cache is in int8, the scales are inputs 12 and 13."""
    if context.cache is not None:
        inputs = [*inputs, *[None] * (12 - len(inputs)), *context.cache.scales[layer]]
        kind = context.cache.kind
        attributes |= {"kv_cache_bit_width": 8, "k_quant_type": kind, "v_quant_type": kind}
    heads = {"num_heads": context.model.dims.heads, "kv_num_heads": context.model.dims.kv_heads}
    out, key, value = context.graph.op("GroupQueryAttention", *inputs, domain=CONTRIB, n=3, **heads, **attributes)
    _present(context, layer, key, value)
    return out


def _flash(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: ScoreRule) -> Any:
    dims = context.model.dims
    if positions.prefix(context) is not None or positions.key_bias(context) is not None:
        raise RequirementError(
            "flash attention takes no bias of scores and no open prefix, and this model has them",
            hint="export with --attention attention or gqa",
        )
    if dims.head_dim % 8 or dims.head_dim > _FLASH_HEAD:
        raise RequirementError(
            f"flash attention needs a head size up to {_FLASH_HEAD} that 8 divides, found {dims.head_dim}",
            hint="export with --attention attention",
        )
    past = _cache(context, layer)
    lengths, total = context.once("flash lengths", lambda: _row_lengths(context))
    inputs = [*qkv, *past, lengths, total]
    return _grouped(context, layer, inputs, scale=rule.scale, softcap=rule.softcap, local_window_size=rule.window)


def _row_lengths(context: GraphContext) -> tuple[Any, Any]:
    """The place of each row's last token, and T, int32: padding comes after it."""
    g = context.graph
    total = g.cast(g.op("Squeeze", context.total(), g.ints(0)), "INT32")
    last = g.op("Sub", g.op("ReduceSum", context.mask, g.ints(1), keepdims=0), g.ints(1))
    return g.cast(last, "INT32"), total


def _lengths(context: GraphContext) -> tuple[Any, Any]:
    """T - 1 for every row, and T, int32: padding is hidden by the bias, on whichever side it is."""
    g = context.graph
    total = g.cast(g.op("Squeeze", context.total(), g.ints(0)), "INT32")
    last = g.op("Expand", g.op("Sub", context.total(), g.ints(1)), context.batch())
    return g.cast(last, "INT32"), total


def _mha(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: ScoreRule) -> Any:
    g, dims = context.graph, context.model.dims
    if dims.heads != dims.kv_heads or rule.softcap is not None:
        what = (
            "a cap on its scores" if rule.softcap is not None else f"{dims.heads} query and {dims.kv_heads} key heads"
        )
        raise RequirementError(
            f"MultiHeadAttention cannot compute this model: it has {what}", hint="export with --attention attention"
        )
    past = _cache(context, layer)
    bias = score_bias(context, positions, rule.window, causal=True)
    out, key, value = g.op(
        "MultiHeadAttention", *qkv, None, None, bias, *past, domain=CONTRIB, n=3, num_heads=dims.heads, scale=rule.scale
    )
    _present(context, layer, key, value)
    return out


_OPS = {"attention": _attention, "flash": _flash, "gqa": _gqa, "mha": _mha}
_EMITTERS: Hooks[Value] = {GroupedQuery: _grouped_query}
