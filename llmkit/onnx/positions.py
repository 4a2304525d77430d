"""The graph reader of the position kinds."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.frequencies import frequencies
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.indexer import RecordingRope
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import Alibi, NoPositions, Rope, SinusoidalPositions
from llmkit.architecture.positions import CoarseAlibi, QueryGrowth, alibi_slopes, sinusoidal_frequencies
from llmkit.architecture.scaling import DynamicNTK, LongRope
from llmkit.lazy_imports import np
from llmkit.onnx.context import GraphContext
from llmkit.onnx.graph import Value


class GraphPositions:
    """What a position kind does in a graph; this one does nothing, others override what they need."""

    def rotate(self, context: GraphContext, x: Value, n_heads: int) -> Value:
        """Heads of queries or keys, [B, S, n_heads * head_dim], with their positions."""
        return x

    def scaled(self, context: GraphContext, queries: Value) -> Value:
        """Queries [B, S, heads * head_dim], after `rotate`, multiplied by what grows with their positions."""
        return queries

    def key_bias(self, context: GraphContext) -> Value | None:
        """What is added to the scores of each key, [B, heads, T] float32; None for nothing."""
        return None

    def prefix(self, context: GraphContext) -> Value | None:
        """[B] int64: keys at places below it are seen by every query; None for causal attention."""
        return None


def build_positions(kind: Kind) -> GraphPositions:
    """The reader of a position kind."""
    reader = emitter_of(kind, _EMITTERS)()
    growth = getattr(kind, "growth", None)
    return reader if growth is None else _ScaledQueries(reader, growth)


class Rotary(GraphPositions):
    """Angles are computed in the graph from positions: no table limits the length, and the graph stays small."""

    def __init__(self, kind: Rope) -> None:
        self._kind = kind

    def rotate(self, context: GraphContext, x: Value, n_heads: int) -> Value:
        cos, sin = context.once(("rope", self._kind), lambda: self._table(context))
        size = context.model.dims.evaluate(self._kind.size)
        rotated = self._kind.rotated(size)
        rotated_heads: Value = context.graph.op(
            "RotaryEmbedding", x, cos, sin,
            num_heads=n_heads,
            interleaved=int(self._kind.pairs == "interleaved"),
            rotary_embedding_dim=rotated if rotated < size else None,
        )  # fmt: skip
        return rotated_heads

    def _table(self, context: GraphContext) -> tuple[Any, Any]:
        """Cos and sin, [B, S, R / 2]."""
        g = context.graph
        inverse, factor = self._frequencies(context)
        at = g.op("Unsqueeze", g.cast(context.positions, "FLOAT"), g.ints(2))
        angles = g.op("Mul", at, inverse)
        tables = []
        for function in ("Cos", "Sin"):
            value = g.op(function, angles)
            if factor != 1.0:
                value = g.op("Mul", value, g.number(factor))
            tables.append(in_compute_dtype(context, value))
        return tables[0], tables[1]

    def _frequencies(self, context: GraphContext) -> tuple[Any, float]:
        """The angular frequencies, [R / 2] or [B, 1, R / 2] where they follow the length, and the factor."""
        g, scaling = context.graph, self._kind.bound_scaling
        dim, theta = self._kind.rotated(context.model.dims.evaluate(self._kind.size)), self._kind.base
        inverse, factor = frequencies(theta, dim, scaling)
        plain = g.constant(inverse)
        if not isinstance(scaling, DynamicNTK | LongRope):
            return plain, factor
        longest = g.op("ReduceSum", context.mask, g.ints(1), keepdims=1)  # [B, 1] real tokens
        is_longer = g.op("Greater", longest, g.ints(scaling.max_position))
        if isinstance(scaling, LongRope):
            long = g.constant(frequencies(theta, dim, scaling, length=scaling.max_position + 1)[0])
        else:
            ratio = g.op("Mul", g.cast(longest, "FLOAT"), g.number(scaling.factor / scaling.max_position))
            ratio = g.op("Sub", ratio, g.number(scaling.factor - 1))
            base = g.op("Mul", g.op("Pow", ratio, g.number(dim / (dim - 2))), g.number(theta))
            exponents = g.constant((-np.arange(0, dim, 2, dtype=np.float32) / dim)[None])
            long = g.op("Unsqueeze", g.op("Pow", base, exponents), g.ints(1))
        return g.op("Where", g.op("Unsqueeze", is_longer, g.ints(1)), long, plain), factor


class _Alibi(GraphPositions):
    def __init__(self, kind: Alibi) -> None:
        self._kind = kind

    def key_bias(self, context: GraphContext) -> Any:
        def make() -> Any:
            g = context.graph
            slopes = g.constant(np.array(self._kind.slopes(context.model.dims.heads), dtype=np.float32)[:, None])
            at = g.op("Unsqueeze", g.cast(context.key_positions(), "FLOAT"), g.ints(1))
            return g.op("Mul", at, slopes)

        return context.once(("alibi", self._kind), make)


class _CoarseAlibi(GraphPositions):
    def key_bias(self, context: GraphContext) -> Any:
        def make() -> Any:
            g, dims = context.graph, context.model.dims

            def rounded(x: Any) -> Any:
                return g.cast(g.cast(x, "BFLOAT16"), "FLOAT")

            slopes = rounded(g.constant(np.array(alibi_slopes(dims.heads), dtype=np.float32)[:, None]))
            at = g.op("Unsqueeze", rounded(g.cast(context.key_positions(), "FLOAT")), g.ints(1))
            return g.op("Mul", rounded(g.op("Mul", at, slopes)), g.number(dims.head_dim**-0.5))

        return context.once("coarse alibi", make)


class _ScaledQueries(GraphPositions):
    """Another reader's positions, with queries scaled by a function of their position."""

    def __init__(self, inner: GraphPositions, growth: QueryGrowth) -> None:
        self._inner, self._growth = inner, growth

    def rotate(self, context: GraphContext, x: Value, n_heads: int) -> Value:
        return self._inner.rotate(context, x, n_heads)

    def scaled(self, context: GraphContext, queries: Value) -> Any:
        return context.graph.op("Mul", queries, context.once(self._growth, lambda: self._factors(context)))

    def key_bias(self, context: GraphContext) -> Value | None:
        return self._inner.key_bias(context)

    def prefix(self, context: GraphContext) -> Value | None:
        return self._inner.prefix(context)

    def _factors(self, context: GraphContext) -> Any:
        """[B, S, 1], once for all layers."""
        g, (beta, length, first) = context.graph, self._growth.numbers
        at = g.op("Add", g.cast(context.positions, "FLOAT"), g.number(first))
        steps = g.op("Floor", g.op("Div", at, g.number(length)))
        logs = g.op("Log", g.op("Add", steps, g.number(1.0)))
        factors = g.op("Add", g.op("Mul", logs, g.number(beta)), g.number(1.0))
        return in_compute_dtype(context, g.op("Unsqueeze", factors, g.ints(2)))


def emit_waves(kind: SinusoidalPositions, context: GraphContext) -> Any:
    """What is added to the embeddings of the new tokens, [B, S, hidden]."""
    g, width = context.graph, context.model.dims.hidden
    rows = g.op("Add", context.positions, g.ints(kind.offset))
    at = g.op("Unsqueeze", g.cast(rows, "FLOAT"), g.ints(2))
    angles = g.op("Mul", at, g.constant(np.array(sinusoidal_frequencies(width), dtype=np.float32)))
    waves = [g.op("Sin", angles), g.op("Cos", angles)]
    if width % 2:
        waves.append(g.op("Mul", at, g.number(0.0)))
    both = g.op("Concat", *waves, axis=-1)
    if kind.empty_row is not None:
        is_there = g.op("Not", g.op("Equal", rows, g.ints(kind.empty_row)))
        both = g.op("Mul", both, g.op("Unsqueeze", g.cast(is_there, "FLOAT"), g.ints(2)))
    return in_compute_dtype(context, both)


def in_compute_dtype(context: GraphContext, value: Any) -> Any:
    """A float32 value in the dtype that the graph computes in."""
    return value if context.dtype == "FLOAT" else context.graph.cast(value, context.dtype)


_EMITTERS: Hooks[GraphPositions] = {
    Rope: Rotary,
    RecordingRope: Rotary,
    Alibi: _Alibi,
    CoarseAlibi: lambda kind: _CoarseAlibi(),
    NoPositions: lambda kind: GraphPositions(),
}
