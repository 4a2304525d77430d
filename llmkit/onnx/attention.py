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
from llmkit.architecture.layer_inputs import NormedValues, SharedKeys
from llmkit.architecture.mamba import ParallelHybrid, SelectiveScan, ShortConvolution, StateSpaceDuality
from llmkit.errors import RequirementError
from llmkit.onnx.context import IN_PLACE, GraphContext
from llmkit.onnx.deltanet import emit_gated_delta_net, emit_kimi_delta_attention
from llmkit.onnx.graph import CONTRIB, Value
from llmkit.onnx.latent import emit_latent
from llmkit.onnx.mamba import emit_duality, emit_selective_scan, emit_short_convolution
from llmkit.onnx.masks import score_bias
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions, in_compute_dtype
from llmkit.onnx.weights import GraphWeights

_FLASH_HEAD = 256  # the largest head of the kernels


@dataclass(frozen=True, slots=True)
class _Scores(ScoreRule):
    """How scores are made.

    Attributes:
        kv_heads: heads of keys.
        size: the width of a head.
        sinks: [heads], where each head has a score without a key.
    """

    kv_heads: int = 0
    size: int = 0
    sinks: Value | None = None

    @classmethod
    def of(cls, kind: GroupedQuery, context: GraphContext, sinks: Value | None = None) -> _Scores:
        """Of a bound kind."""
        size, kv_heads = kind.head_sizes(context.model.dims)
        rule = kind.score_rule(size)
        return cls(rule.scale, rule.softcap, rule.window, kv_heads, size, sinks, chunk=rule.chunk)


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
    scores = _Scores.of(kind, context, weights.value("sinks") if as_bool(kind.sinks) else None)
    q, k, v, *gate = weights.project(x, ("q", "k", "v", "gate") if kind.is_gated else ("q", "k", "v"))
    q, k = (q, k) if kind.norms_rotated else _normed(kind, weights, q, k, scores)
    if (limit := kind.limit) is not None:
        ends = weights.number(-limit), weights.number(limit)
        q, k, v = (context.graph.op("Clip", part, *ends) for part in (q, k, v))
    q = positions.rotate(context, q, context.model.dims.heads)
    k = positions.rotate(context, k, scores.kv_heads)
    q, k = _normed(kind, weights, q, k, scores) if kind.norms_rotated else (q, k)
    q = positions.scaled(context, q)
    attended = _OPS[context.attention](context, layer, (q, k, v), positions, scores)
    if gate:
        attended = weights.graph.op("Mul", attended, weights.graph.op("Sigmoid", gate[0]))
    return weights.linear(attended, "o")


def _normed(kind: GroupedQuery, weights: GraphWeights, q: Any, k: Any, scores: _Scores) -> tuple[Any, Any]:
    """Queries and keys normed, if the kind has norms."""
    if kind.norms is None:
        return q, k
    q_norm, k_norm = kind.norms
    if kind.norms_all_heads:
        return emit_norm(q_norm, weights.under("q_norm"), q), emit_norm(k_norm, weights.under("k_norm"), k)
    return (
        _head_norm(q_norm, weights.under("q_norm"), q, weights.model.dims.heads, scores.size),
        _head_norm(k_norm, weights.under("k_norm"), k, scores.kv_heads, scores.size),
    )


def _head_norm(kind: Kind, weights: GraphWeights, x: Any, heads: int, size: int) -> Any:
    g = weights.graph
    split = g.op("Reshape", x, g.ints(0, 0, heads, size))
    return g.op("Reshape", emit_norm(kind, weights, split), g.ints(0, 0, heads * size))


def _cache(context: GraphContext, layer: int, rule: _Scores) -> tuple[Any, Any]:
    """The inputs that hold past keys and values, [B, kv_heads, P, head_dim]."""
    shape: list[int | str] = ["batch_size", rule.kv_heads, "past_sequence_length", rule.size]
    names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    past = [context.graph.input(name, context.cache_dtype, shape) for name in names]
    return past[0], past[1]


def _present(context: GraphContext, layer: int, key: Any, value: Any, rule: _Scores) -> None:
    context.present[layer] = key, value
    shape: list[int | str] = ["batch_size", rule.kv_heads, "total_sequence_length", rule.size]
    for part, value_out in (("key", key), ("value", value)):
        context.graph.output(value_out, f"present.{layer}.{part}", context.cache_dtype, shape)
        context.state[f"past_key_values.{layer}.{part}"] = f"present.{layer}.{part}"


def _attention(
    context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores
) -> Any:
    if rule.sinks is not None:
        return _beside_sinks(context, layer, qkv, positions, rule)
    past = _cache(context, layer, rule)
    has_prefix = positions.prefix(context) is not None
    bias = score_bias(context, positions, rule.window, causal=has_prefix, chunk=rule.chunk)
    out, key, value = context.graph.op(
        "Attention", *qkv, bias, *past,
        n=3,
        is_causal=int(not has_prefix),
        q_num_heads=context.model.dims.heads,
        kv_num_heads=rule.kv_heads,
        scale=rule.scale,
        softcap=rule.softcap,
    )  # fmt: skip
    _present(context, layer, key, value, rule)
    return out


def _beside_sinks(
    context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores
) -> Any:
    """The standard op has no sinks: one more key and value of zeros stand for them, and the bias is the score."""
    g, dims = context.graph, context.model.dims
    sizes = dims.heads, rule.kv_heads, rule.kv_heads
    query, *pair = [_split(context, x, n, rule.size) for x, n in zip(qkv, sizes, strict=True)]
    pair = [g.op("Concat", old, new, axis=2) for old, new in zip(_cache(context, layer, rule), pair, strict=True)]
    zeros = context.once(("sink's key", rule.kv_heads, rule.size), lambda: _zero_key(context, rule))
    bias = score_bias(context, positions, rule.window, causal=True, chunk=rule.chunk)
    shape = g.op("Concat", context.batch(), g.ints(dims.heads), context.length(), g.ints(1), axis=0)
    column = g.op("Expand", g.op("Reshape", rule.sinks, g.ints(1, dims.heads, 1, 1)), shape)
    every = g.op("Concat", context.batch(), g.ints(dims.heads), context.length(), context.total(), axis=0)
    bias = g.op("Concat", g.op("Expand", bias, every), column, axis=-1)
    wide = [g.op("Concat", x, zeros, axis=2) for x in pair]
    out = g.op("Attention", query, *wide, bias, scale=rule.scale, softcap=rule.softcap)
    _present(context, layer, pair[0], pair[1], rule)
    return _joined(context, out, rule)


def _split(context: GraphContext, x: Any, n: int, size: int) -> Any:
    """[B, S, n * size] -> [B, n, S, size]."""
    g = context.graph
    return g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, n, size)), perm=[0, 2, 1, 3])


def _joined(context: GraphContext, out: Any, rule: _Scores) -> Any:
    """[B, heads, S, head_dim] -> [B, S, heads * head_dim]."""
    g = context.graph
    width = context.model.dims.heads * rule.size
    return g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.ints(0, 0, width))


def _zero_key(context: GraphContext, rule: _Scores) -> Any:
    """[B, kv_heads, 1, head_dim] of zeros in the compute dtype."""
    g = context.graph
    shape = g.op("Concat", context.batch(), g.ints(rule.kv_heads, 1, rule.size), axis=0)
    return g.op("Expand", g.cast(g.number(0.0), context.dtype), shape)


def _gqa(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores) -> Any:
    if rule.size % 8:
        other = "leave --kv-cache-dtype out" if context.cache is not None else "export with --attention attention"
        raise RequirementError(f"GroupQueryAttention needs a head size that 8 divides, found {rule.size}", hint=other)
    past = _cache(context, layer, rule)
    has_prefix = positions.prefix(context) is not None
    bias = score_bias(context, positions, rule.window, causal=has_prefix, chunk=rule.chunk)
    lengths, total = context.once("gqa lengths", lambda: _lengths(context))
    inputs = [*qkv, *past, lengths, total, None, None, None, bias, rule.sinks]
    causal = 0 if has_prefix else None
    return _grouped(context, layer, rule, inputs, scale=rule.scale, softcap=rule.softcap, causal=causal)


def _grouped(context: GraphContext, layer: int, rule: _Scores, inputs: list[Any], **attributes: Any) -> Any:
    """GroupQueryAttention; where its cache is in int8, the scales are inputs 12 and 13."""
    if context.cache is not None:
        inputs = [*inputs, *[None] * (12 - len(inputs)), *context.cache.scales[layer]]
        kind = context.cache.kind
        attributes |= {"kv_cache_bit_width": 8, "k_quant_type": kind, "v_quant_type": kind}
    heads = {"num_heads": context.model.dims.heads, "kv_num_heads": rule.kv_heads}
    out, key, value = context.graph.op("GroupQueryAttention", *inputs, domain=CONTRIB, n=3, **heads, **attributes)
    _present(context, layer, key, value, rule)
    return out


def _flash(context: GraphContext, layer: int, qkv: Sequence[Value], positions: GraphPositions, rule: _Scores) -> Any:
    if rule.chunk is not None or positions.prefix(context) is not None or positions.key_bias(context) is not None:
        raise RequirementError(
            "flash attention takes no bias of scores, no open prefix and no chunks, and this model has them",
            hint="export with --attention attention or gqa",
        )
    if rule.size % 8 or rule.size > _FLASH_HEAD:
        raise RequirementError(
            f"flash attention needs a head size up to {_FLASH_HEAD} that 8 divides, found {rule.size}",
            hint="export with --attention attention",
        )
    past = _cache(context, layer, rule)
    lengths, total = context.once("flash lengths", lambda: _row_lengths(context))
    inputs = [*qkv, *past, lengths, total, None, None, None, None, rule.sinks]
    return _grouped(context, layer, rule, inputs, scale=rule.scale, softcap=rule.softcap, local_window_size=rule.window)


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
        f"{dims.heads} query and {rule.kv_heads} key heads": dims.heads != rule.kv_heads,
    }
    if what := next((name for name, is_there in lacks.items() if is_there), None):
        raise RequirementError(
            f"MultiHeadAttention cannot compute this model: it has {what}", hint="export with --attention attention"
        )
    past = _cache(context, layer, rule)
    bias = score_bias(context, positions, rule.window, causal=True, chunk=rule.chunk)
    out, key, value = g.op(
        "MultiHeadAttention", *qkv, None, None, bias, *past, domain=CONTRIB, n=3, num_heads=dims.heads, scale=rule.scale
    )
    _present(context, layer, key, value, rule)
    return out


_OPS = {"attention": _attention, "flash": _flash, "gqa": _gqa, "mha": _mha}


def _normed_values(
    kind: NormedValues, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    scores = _Scores.of(kind, context)
    q, k, *own = weights.project(x, ("q", "k", "v") if kind.has_own_values else ("q", "k"))
    v = _head_norm(kind.v_norm, weights.under("v_norm"), own[0] if own else k, scores.kv_heads, scores.size)
    q, k = _normed(kind, weights, q, k, scores)
    q = positions.scaled(context, positions.rotate(context, q, context.model.dims.heads))
    k = positions.rotate(context, k, scores.kv_heads)
    return weights.linear(_OPS[context.attention](context, layer, (q, k, v), positions, scores), "o")


def _shared_keys(
    kind: SharedKeys, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    """The standard op over what an earlier layer has for all tokens, whatever the op that made it."""
    if context.attention == "flash":
        raise RequirementError(
            "flash attention has no form for layers that take the keys and values of another",
            hint="export with --attention attention",
        )
    g, scores, n_q = context.graph, _Scores.of(kind, context), context.model.dims.heads
    q = weights.linear(x, "q")
    if kind.norms is not None:
        q = _head_norm(kind.norms[0], weights.under("q_norm"), q, n_q, scores.size)
    q = positions.scaled(context, positions.rotate(context, q, n_q))
    keys, values = context.once(("keys and values", kind.source), lambda: _whole(context, kind.source))
    bias = score_bias(context, positions, scores.window, causal=True, chunk=scores.chunk)
    query = _split(context, q, n_q, scores.size)
    out = g.op("Attention", query, keys, values, bias, scale=scores.scale, softcap=scores.softcap)
    return weights.linear(_joined(context, out, scores), "o")


def _whole(context: GraphContext, source: int) -> list[Any]:
    """Keys and values of all T tokens in the compute dtype, of a buffer that may have room for more."""
    g, pair = context.graph, list(context.present[source])
    if context.attention in IN_PLACE:
        pair = [g.op("Slice", held, g.ints(0), context.total(), g.ints(2)) for held in pair]
    if context.cache is not None:
        scales = context.cache.scales[source]
        floats = [g.op("Mul", g.cast(x, "FLOAT"), scale) for x, scale in zip(pair, scales, strict=True)]
        pair = [in_compute_dtype(context, x) for x in floats]
    return pair


def _beside(
    kind: ParallelHybrid, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    def scaled(value: Any, factor: float) -> Any:
        return value if factor == 1 else context.graph.op("Mul", value, weights.number(factor))

    (a_in, a_out), (r_in, r_out) = kind.attention_factors, kind.recurrence_factors
    attended = emit_attention(kind.attention, context, weights, layer, positions, scaled(x, a_in))
    with context.graph.scope("ssm"):
        mixed = emit_attention(kind.recurrence, context, weights.under("ssm"), layer, positions, scaled(x, r_in))
    return context.graph.op("Add", scaled(attended, a_out), scaled(mixed, r_out))


_EMITTERS: Hooks[Value] = {
    ParallelHybrid: _beside,
    GatedDeltaNet: emit_gated_delta_net,
    GroupedQuery: _grouped_query,
    IndexedAttention: emit_latent,
    KimiDeltaAttention: emit_kimi_delta_attention,
    NormedValues: _normed_values,
    SharedKeys: _shared_keys,
    LatentAttention: emit_latent,
    SelectiveScan: emit_selective_scan,
    ShortConvolution: emit_short_convolution,
    StateSpaceDuality: emit_duality,
}
