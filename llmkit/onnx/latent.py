"""The graph reader of latent attention: the cache is one input a layer, [B, 1, P, kv_rank + rotated dims].

The runtime hands on what is compressed; the graph appends the new tokens' and attends to all of it with one key head,
whose values are its first numbers.
"""

from __future__ import annotations

from typing import Any

from llmkit.architecture.indexer import IndexedAttention
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.storage import parts_of
from llmkit.errors import RequirementError
from llmkit.onnx.context import GraphContext
from llmkit.onnx.indexer import chosen, index_keys
from llmkit.onnx.masks import score_bias
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.weights import GraphWeights


def emit_latent(
    kind: LatentAttention, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
) -> Any:
    """The attention of one layer: x [B, S, hidden] -> [B, S, hidden].

    Raises:
        RequirementError: the chosen op, or an int8 cache, keeps keys and values, of which this attention has none.
    """
    if context.cache is not None:
        raise RequirementError(
            "an int8 cache holds keys and values, and latent attention caches neither",
            hint="leave --kv-cache-dtype out",
        )
    if context.attention != "attention":
        raise RequirementError(
            f"the attention op {context.attention!r} caches keys and values of one width; latent attention caches "
            "one compressed vector a token",
            hint="export with --attention attention",
        )
    g, dims = context.graph, context.model.dims
    heads, n_rotated = dims.heads, dims.head_dim
    rank, nope, width, value = (dims.extra[name] for name in ("kv_rank", "nope", "cache_width", "v_width"))
    indexer = kind if isinstance(kind, IndexedAttention) else None
    compressed = x
    if kind.compresses_queries:
        compressed = emit_norm(kind.norm("q_rank"), weights.under("q_a_norm"), weights.linear(x, "q_a"))
        queries = weights.linear(compressed, "q_b")
    else:
        queries = weights.linear(x, "q")
    queries = positions.scaled(context, queries)
    queries = g.op("Reshape", queries, g.ints(0, 0, heads, nope + n_rotated))
    plain, rotated = g.op("Split", queries, g.ints(nope, n_rotated), n=2, axis=-1)
    rotated = positions.rotate(context, g.op("Reshape", rotated, g.ints(0, 0, heads * n_rotated)), heads)
    rotated = g.op("Transpose", g.op("Reshape", rotated, g.ints(0, 0, heads, n_rotated)), perm=[0, 2, 1, 3])
    latent, key = g.op("Split", weights.linear(x, "kv_a"), g.ints(rank, n_rotated), n=2, axis=-1)
    latent = emit_norm(kind.norm("kv_rank"), weights.under("kv_a_norm"), latent)
    parts = [latent, positions.rotate(context, key, 1)]
    if indexer is not None and not indexer.shares:
        width = indexer.cached(dims)
        parts.append(index_keys(indexer, context, weights, positions, x))
    new = g.op("Unsqueeze", g.op("Concat", *parts, axis=-1), g.ints(1))

    past_name, present_name = f"past_latents.{layer}", f"present_latents.{layer}"
    past = g.input(past_name, context.dtype, ["batch_size", 1, "past_sequence_length", width])
    cache = g.op("Concat", past, new, axis=2)
    g.output(cache, present_name, context.dtype, ["batch_size", 1, "total_sequence_length", width])
    context.state[past_name] = present_name

    plain = g.op("MatMul", g.op("Transpose", plain, perm=[0, 2, 1, 3]), _by_head(weights, "k_b", nope))
    q, bias = g.op("Concat", plain, rotated, axis=-1), score_bias(context, positions, None, causal=True)
    seen = cache
    if indexer is not None:
        seen, bias = chosen(indexer, context, weights, positions, (x, compressed, cache), bias)
    attended = g.op("Attention", q, seen, seen, bias, scale=kind.score_rule(dims.extra["qk_width"]).scale)
    attended = g.op("Slice", attended, g.ints(0), g.ints(rank), g.ints(-1))
    values = g.op("MatMul", attended, g.op("Transpose", _by_head(weights, "v_b", value), perm=[0, 2, 1]))
    values = g.op("Reshape", g.op("Transpose", values, perm=[0, 2, 1, 3]), g.ints(0, 0, heads * value))
    return weights.linear(values, "o")


def _by_head(weights: GraphWeights, name: str, rows: int) -> Any:
    """A matrix that expands what is compressed, [heads, rows, kv_rank]: floats also where it is stored on a grid."""
    slot = weights.slot(f"{name}.weight")
    lazy = parts_of(weights.restored(slot), slot)[f"{weights.stem}{name}.weight"]
    matrix = weights.derived(f"{slot.name}.{name}" if len(slot.parts) > 1 else slot.name, lazy)
    return weights.graph.op("Reshape", matrix, weights.graph.ints(-1, rows, weights.model.dims.extra["kv_rank"]))
