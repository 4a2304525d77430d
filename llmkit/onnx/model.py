"""From an architecture to a graph: embedding, layers, head; weights are named as the checkpoint names them.

Inputs are those that ONNX Runtime GenAI and Optimum feed: `input_ids` and `position_ids` [B, S], `attention_mask`
[B, T], `past_key_values.N.key|value` [B, kv_heads, P, head_dim]; outputs `logits` [B, S, vocab] float32 and
`present.N.key|value`. A family whose positions or memory are of another sort adds inputs of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.architecture.kinds import LearnedPositions, NoPositions, SinusoidalPositions
from llmkit.architecture.model import Model
from llmkit.architecture.storage import normalized_rows
from llmkit.errors import RequirementError
from llmkit.lazy_imports import onnx
from llmkit.onnx.context import IN_PLACE, AttentionOp, GraphContext, Int8Cache
from llmkit.onnx.graph import CONTRIB, Graph
from llmkit.onnx.integer_matrices import IntegerMatrices
from llmkit.onnx.kv_cache import CacheScales
from llmkit.onnx.layer_inputs import emit_inputs
from llmkit.onnx.layers import emit_layer
from llmkit.onnx.norms import Stream, emit_norm
from llmkit.onnx.positions import build_positions, emit_waves
from llmkit.onnx.weights import DataOf, GraphWeights
from llmkit.tensors.lazy import Lazy

ACCURACY = "llmkit.accuracy_level"
"""Metadata key: what products with integers are computed in; absent where there are none."""

_IN_PLACE_DOC = (
    "GroupQueryAttention computes a batch of several rows in one call for the whole prompt, and one token a call after "
    "it. Several tokens that continue a past it takes for one row only: give one row a call then, or export with "
    "`--attention attention`, whose op takes a batch in any stretches."
)


def build_graph(
    model: Model,
    tensors: Mapping[str, Lazy],
    data_of: DataOf,
    *,
    dtype: str = "FLOAT",
    attention: AttentionOp = "attention",
    grids: IntegerMatrices | None = None,
    cache: CacheScales | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a checkpoint.

    Args:
        model: the architecture bound to the config.
        tensors: the checkpoint's tensors by name; specs are enough, unless `data_of` loads.
        data_of: the data of the initializer of a tensor, or None: it lies in a file.
        dtype: the compute dtype: FLOAT, FLOAT16 or BFLOAT16; logits are float32.
        attention: the op that computes attention.
        grids: matrices that are computed from integers.
        cache: scales of keys and values that are kept in int8, as `gqa` and `flash` can; None: the compute dtype.

    Raises:
        RequirementError: a kind has no emitter, or the attention op cannot compute the model or keep its cache.
    """
    graph = Graph(model.family)
    ids = graph.input("input_ids", "INT64", ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
    positions = graph.input("position_ids", "INT64", ["batch_size", "sequence_length"])
    weights = GraphWeights(graph, model, tensors, data_of, dtype, grids or IntegerMatrices())
    int8 = _int8_cache(weights, cache, attention) if cache is not None else None
    context = GraphContext(graph, model, dtype, attention, ids, mask, positions, int8)
    stream = Stream(weights, _embedded(context, weights))
    kinds = [getattr(block, "position", NoPositions()) for block in model.blocks]
    readers = {kind: build_positions(kind) for kind in kinds}
    for i, (kind, block) in enumerate(zip(kinds, model.blocks, strict=True)):
        with graph.scope(f"layers.{i}"):
            emit_layer(block, context, weights.under(f"layers.{i}"), i, readers[kind], stream)
    if cache is not None and not any(name.startswith("past_key_values.") for name in context.state):
        raise RequirementError(
            f"{model.family} keeps no keys and values that could be in int8", hint="leave --kv-cache-dtype out"
        )
    with graph.scope("head"):
        hidden = stream.normed(model.final_norm, weights.under("final_norm"))
        logits = _logits(context, weights, hidden)
    shape: list[int | str] = ["batch_size", "sequence_length", model.dims.vocab]
    graph.output(logits, "logits", "FLOAT", shape, is_first=True)
    facts = {"family": model.family, "attention": attention}
    facts |= {"hidden": str(hidden.name), "hidden_size": str(model.dims.hidden), "dtype": dtype}
    facts |= {"state": json.dumps(context.state), "initial": json.dumps(context.initial)}
    about = {f"llmkit.{key}": value for key, value in facts.items()}
    about |= {ACCURACY: str(grids.accuracy_level)} if grids and grids.matrices else {}
    return graph.model(about, _IN_PLACE_DOC if attention in IN_PLACE else "")


def first_graph(
    ops: Sequence[AttentionOp], build: Callable[[AttentionOp], onnx.ModelProto]
) -> tuple[AttentionOp, onnx.ModelProto]:
    """The graph with the first op for attention that can compute the model.

    Raises:
        RequirementError: what the last one lacks.
    """
    for op in ops[:-1]:
        try:
            return op, build(op)
        except RequirementError:
            continue
    return ops[-1], build(ops[-1])


def _int8_cache(weights: GraphWeights, cache: CacheScales, attention: AttentionOp) -> Int8Cache:
    if attention not in IN_PLACE:
        raise RequirementError(
            f"the attention op {attention!r} has no int8 cache; {' and '.join(IN_PLACE)} have",
            hint="export with --attention gqa, or leave --kv-cache-dtype out",
        )
    pairs = zip(cache.keys, cache.values, strict=True)
    scales = [
        (weights.initializer(f"layers.{i}.attn.k_scale", k), weights.initializer(f"layers.{i}.attn.v_scale", v))
        for i, (k, v) in enumerate(pairs)
    ]
    return Int8Cache(scales, cache.kind)


def _embedded(context: GraphContext, weights: GraphWeights) -> Any:
    kind, g = context.model.embedding, context.graph
    with g.scope("embed"):
        x = weights.rows("embed.weight", context.ids)
        if kind.multiplier is not None:
            x = g.op("Mul", x, weights.number(kind.multiplier))
        if weights.has("embed_proj.weight"):
            x = weights.linear(x, "embed_proj")
        if isinstance(kind.positions, LearnedPositions):
            at = context.positions
            if kind.positions.offset:
                at = g.op("Add", at, g.ints(kind.positions.offset))
            x = g.op("Add", x, weights.rows("positions.weight", at))
        elif isinstance(kind.positions, SinusoidalPositions):
            x = g.op("Add", x, emit_waves(kind.positions, context))
        elif not isinstance(kind.positions, NoPositions):
            raise RequirementError(f"the ONNX export cannot add {type(kind.positions).__name__} to embeddings")
        x = emit_norm(kind.norm, weights.under("embed_norm"), x)
        return emit_inputs(kind.beside, context, weights.under("beside"), x)


def _logits(context: GraphContext, weights: GraphWeights, x: Any) -> Any:
    g, kind = context.graph, context.model.head
    if weights.has("head_proj.weight"):
        x = weights.linear(x, "head_proj")
    leaf = "embed.weight" if context.model.is_tied else "head.weight"
    slot = weights.slot(leaf)
    if kind.is_normalized and not weights.is_on_grid(slot):
        matrix = weights.derived(f"{slot.name}.normalized", normalized_rows(weights.lazy(slot)))
        logits = g.op("FusedMatMul", x, matrix, domain=CONTRIB, transB=1)
    else:
        logits = weights.product(x, slot)
    if weights.has("head.bias"):
        logits = g.op("Add", logits, weights.value("head.bias"))
    logits = weights.single(logits)
    if kind.multiplier is not None:
        logits = g.op("Mul", logits, g.number(kind.multiplier))
    if kind.cap is not None:
        cap = g.number(kind.cap)
        logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap)
    return logits
