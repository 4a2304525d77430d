"""The graph reader of the attention kinds: one fused op, whichever ONNX Runtime computes best.

`attention` is the standard op of opset 23: any head size, padding on either side, any chunk. `gqa` is ONNX Runtime's
GroupQueryAttention, whose cache may be a buffer that is written in place; `flash` is the same op without a mask that is
added to the scores, which is what the flash kernels of CUDA take: padding follows the tokens of a row then. `mha` is
its MultiHeadAttention, which every version and provider has, for models whose query heads all have keys of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.attention import ScoreRule
from llmkit.architecture.deltanet import GatedDeltaNet, KimiDeltaAttention
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.indexer import IndexedAttention
from llmkit.architecture.keys import as_bool
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import GroupedQuery
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.mamba import BesideAttention, SelectiveScan, ShortConvolution, StateSpaceDuality
from llmkit.errors import RequirementError
from llmkit.onnx.context import GraphContext
from llmkit.onnx.deltanet import emit_gated_delta_net, emit_kimi_delta_attention
from llmkit.onnx.graph import CONTRIB, Value
from llmkit.onnx.latent import emit_latent
from llmkit.onnx.mamba import emit_duality, emit_selective_scan, emit_short_convolution
from llmkit.onnx.masks import score_bias
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.weights import GraphWeights

_FLASH_HEAD = 256  # the largest head of the kernels


@dataclass(frozen=True, slots=True)
class _Scores(ScoreRule):
    """How scores are made; `sinks` [heads], where each head has a score without a key."""

    sinks: Value | None = None


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
    q, k, v, *gate = weights.project(x, ("q", "k", "v", "gate") if kind.is_gated else ("q", "k", "v"))
    q, k = (q, k) if kind.norms_rotated else _normed(kind, weights, q, k)
    if (limit := kind.limit) is not None:
        ends = weights.number(-limit), weights.number(limit)
        q, k, v = (context.graph.op("Clip", part, *ends) for part in (q, k, v))
    q, k = positions.rotate(context, q, dims.heads), positions.rotate(context, k, dims.kv_heads)
    q, k = _normed(kind, weights, q, k) if kind.norms_rotated else (q, k)
    q = positions.scaled(context, q)
    rule = kind.score_rule(dims.head_dim)
    sinks = weights.value("sinks") if as_bool(kind.sinks) else None
    scores = _Scores(rule.scale, rule.softcap, rule.window, sinks, chunk=rule.chunk)
    attended = _OPS[context.attention](context, layer, (q, k, v), positions, scores)
    if gate:
        attended = weights.graph.op("Mul", attended, weights.graph.op("Sigmoid", gate[0]))
    return weights.linear(attended, "o")


def _normed(kind: GroupedQuery, weights: GraphWeights, q: Any, k: Any) -> tuple[Any, Any]:
    """Queries and keys normed, if the kind has norms."""
    if kind.norms is None:
        return q, k
    (q_norm, k_norm), dims = kind.norms, weights.model.dims
    if kind.norms_all_heads:
        return emit_norm(q_norm, weights.under("q_norm"), q), emit_norm(k_norm, weights.under("k_norm"), k)
    return (
        _head_norm(q_norm, weights.under("q_norm"), q, dims.heads, dims.head_dim),
        _head_norm(k_norm, weights.under("k_norm"), k, dims.kv_heads, dims.head_dim),
    )


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
    context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores
) -> Any:
    if rule.sinks is not None:
        return _beside_sinks(context, layer, qkv, positions, rule)
    past = _cache(context, layer)
    has_prefix = positions.prefix(context) is not None
    bias = score_bias(context, positions, rule.window, causal=has_prefix, chunk=rule.chunk)
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


def _beside_sinks(
    context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores
) -> Any:
    """The standard op has no sinks: one more key and value of zeros stand for them, and the bias is the score."""
    g, dims = context.graph, context.model.dims
    sizes = dims.heads, dims.kv_heads, dims.kv_heads
    heads = [
        g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, n, dims.head_dim)), perm=[0, 2, 1, 3])
        for x, n in zip(qkv, sizes, strict=True)
    ]
    query, *pair = heads
    pair = [g.op("Concat", old, new, axis=2) for old, new in zip(_cache(context, layer), pair, strict=True)]
    zeros = context.once("sink's key", lambda: _zero_key(context))
    bias = score_bias(context, positions, rule.window, causal=True, chunk=rule.chunk)
    shape = g.op("Concat", context.batch(), g.ints(dims.heads), context.length(), g.ints(1), axis=0)
    column = g.op("Expand", g.op("Reshape", rule.sinks, g.ints(1, dims.heads, 1, 1)), shape)
    every = g.op("Concat", context.batch(), g.ints(dims.heads), context.length(), context.total(), axis=0)
    bias = g.op("Concat", g.op("Expand", bias, every), column, axis=-1)
    wide = [g.op("Concat", x, zeros, axis=2) for x in pair]
    out = g.op("Attention", query, *wide, bias, scale=rule.scale, softcap=rule.softcap)
    _present(context, layer, *pair)
    return g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.ints(0, 0, dims.heads * dims.head_dim))


def _zero_key(context: GraphContext) -> Any:
    """[B, kv_heads, 1, head_dim] of zeros in the compute dtype."""
    g, dims = context.graph, context.model.dims
    shape = g.op("Concat", context.batch(), g.ints(dims.kv_heads, 1, dims.head_dim), axis=0)
    return g.op("Expand", g.cast(g.number(0.0), context.dtype), shape)


def _gqa(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores) -> Any:
    dims = context.model.dims
    if dims.head_dim % 8:
        other = "leave --kv-cache-dtype out" if context.cache is not None else "export with --attention attention"
        raise RequirementError(
            f"GroupQueryAttention needs a head size that 8 divides, found {dims.head_dim}", hint=other
        )
    past = _cache(context, layer)
    has_prefix = positions.prefix(context) is not None
    bias = score_bias(context, positions, rule.window, causal=has_prefix, chunk=rule.chunk)
    lengths, total = context.once("gqa lengths", lambda: _lengths(context))
    inputs = [*qkv, *past, lengths, total, None, None, None, bias, rule.sinks]
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


def _flash(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores) -> Any:
    dims = context.model.dims
    if rule.chunk is not None or positions.prefix(context) is not None or positions.key_bias(context) is not None:
        raise RequirementError(
            "flash attention takes no bias of scores, no open prefix and no chunks, and this model has them",
            hint="export with --attention attention or gqa",
        )
    if dims.head_dim % 8 or dims.head_dim > _FLASH_HEAD:
        raise RequirementError(
            f"flash attention needs a head size up to {_FLASH_HEAD} that 8 divides, found {dims.head_dim}",
            hint="export with --attention attention",
        )
    past = _cache(context, layer)
    lengths, total = context.once("flash lengths", lambda: _row_lengths(context))
    inputs = [*qkv, *past, lengths, total, None, None, None, None, rule.sinks]
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


def _mha(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores) -> Any:
    g, dims = context.graph, context.model.dims
    lacks = {
        "attention sinks": rule.sinks is not None,
        "a cap on its scores": rule.softcap is not None,
        f"{dims.heads} query and {dims.kv_heads} key heads": dims.heads != dims.kv_heads,
    }
    if what := next((name for name, is_there in lacks.items() if is_there), None):
        raise RequirementError(
            f"MultiHeadAttention cannot compute this model: it has {what}", hint="export with --attention attention"
        )
    past = _cache(context, layer)
    bias = score_bias(context, positions, rule.window, causal=True, chunk=rule.chunk)
    out, key, value = g.op(
        "MultiHeadAttention", *qkv, None, None, bias, *past, domain=CONTRIB, n=3, num_heads=dims.heads, scale=rule.scale
    )
    _present(context, layer, key, value)
    return out


_OPS = {"attention": _attention, "flash": _flash, "gqa": _gqa, "mha": _mha}


def _beside(
    kind: BesideAttention, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    def scaled(value: Any, factor: float) -> Any:
        return value if factor == 1 else context.graph.op("Mul", value, weights.number(factor))

    (a_in, a_out), (r_in, r_out) = kind.attention_factors, kind.recurrence_factors
    attended = emit_attention(kind.attention, context, weights, layer, positions, scaled(x, a_in))
    with context.graph.scope("ssm"):
        mixed = emit_attention(kind.recurrence, context, weights.under("ssm"), layer, positions, scaled(x, r_in))
    return context.graph.op("Add", scaled(attended, a_out), scaled(mixed, r_out))


_EMITTERS: Hooks[Value] = {
    BesideAttention: _beside,
    GatedDeltaNet: emit_gated_delta_net,
    GroupedQuery: _grouped_query,
    IndexedAttention: emit_latent,
    KimiDeltaAttention: emit_kimi_delta_attention,
    LatentAttention: emit_latent,
    SelectiveScan: emit_selective_scan,
    ShortConvolution: emit_short_convolution,
    StateSpaceDuality: emit_duality,
}
