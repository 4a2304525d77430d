"""The indexer of sparse latent attention in a graph: standard operators choose, and what is not chosen is hidden.

ONNX Runtime 1.32 has no operator that attends to chosen keys only: all are read, and a bias hides the others.
"""

from __future__ import annotations

from typing import Any

from llmkit.architecture.indexer import IndexedAttention
from llmkit.errors import RequirementError
from llmkit.onnx.context import GraphContext
from llmkit.onnx.masks import HIDDEN
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.weights import GraphWeights

_NOTE = "selection"


def index_keys(
    kind: IndexedAttention, context: GraphContext, weights: GraphWeights, positions: GraphPositions, x: Any
) -> Any:
    """The keys of new tokens x [B, S, hidden], [B, S, index_dim]."""
    key = emit_norm(kind.index_norm, weights.under("index_k_norm"), weights.linear(x, "index_k"))
    return _rotated(kind, context, positions, key, 1)


def chosen(
    kind: IndexedAttention,
    context: GraphContext,
    weights: GraphWeights,
    positions: GraphPositions,
    given: tuple[Any, Any, Any],
    bias: Any,
) -> tuple[Any, Any]:
    """What is attended to [B, 1, T, cache_width], and the bias that hides what is not chosen, [B, 1, S, T].

    Args:
        given: x [B, S, hidden], its compressed queries, and all that is cached, [B, 1, T, width].
        bias: hides what no query may see.

    Raises:
        RequirementError: a layer that shares a choice has none before it.
    """
    g, dims = context.graph, context.model.dims
    x, compressed, cache = given
    if kind.shares:
        if _NOTE not in context.notes:
            raise RequirementError("a layer shares the choice of keys of one before it, and there is none")
        return cache, g.op("Add", bias, context.notes[_NOTE])
    heads, width, kept = dims.extra["index_heads"], dims.extra["index_dim"], dims.extra["cache_width"]
    latents, keys = g.op("Split", cache, g.ints(kept, width), n=2, axis=-1)
    queries = _rotated(kind, context, positions, weights.linear(compressed, "index_q"), heads)
    queries = weights.single(g.op("Reshape", queries, g.ints(0, 0, heads, width)))
    keys = weights.single(g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    products = g.op("Relu", g.op("MatMul", queries, keys))  # [B, S, H, T]
    shares = g.op("Mul", weights.single(weights.linear(x, "index_weights")), g.number((heads * width) ** -0.5))
    scores = g.op("MatMul", g.op("Unsqueeze", shares, g.ints(2)), products)  # [B, S, 1, T]
    scores = g.op("Add", g.op("Transpose", scores, perm=[0, 2, 1, 3]), weights.single(bias))
    count = context.once(("chosen", kind.n_seen), lambda: g.op("Min", context.total(), g.ints(kind.n_seen)))
    _, best = g.op("TopK", scores, count, n=2, axis=-1)
    hidden = g.op("Expand", g.number(HIDDEN[context.dtype]), g.op("Shape", scores))
    shown = g.op("Expand", g.number(0.0), g.op("Shape", best))
    choice = weights.computed(g.op("ScatterElements", hidden, best, shown, axis=3))
    context.notes[_NOTE] = choice
    return latents, g.op("Add", bias, choice)


def _rotated(kind: IndexedAttention, context: GraphContext, positions: GraphPositions, x: Any, heads: int) -> Any:
    """Index heads [B, S, heads * index_dim] with their positions; pairs lie as those of the attention."""
    g, dims = context.graph, context.model.dims
    n_rotated, width = dims.head_dim, dims.extra["index_dim"]
    x = g.op("Reshape", x, g.ints(0, 0, heads, width))
    if (order := kind.order(dims)) is not None:
        x = g.op("Gather", x, g.ints(*order), axis=3)
    first, rest = (
        (x, None) if n_rotated == width else g.op("Split", x, g.ints(n_rotated, width - n_rotated), n=2, axis=-1)
    )
    first = positions.rotate(context, g.op("Reshape", first, g.ints(0, 0, heads * n_rotated)), heads)
    first = g.op("Reshape", first, g.ints(0, 0, heads, n_rotated))
    whole = first if rest is None else g.op("Concat", first, rest, axis=-1)
    return g.op("Reshape", whole, g.ints(0, 0, heads * width))
