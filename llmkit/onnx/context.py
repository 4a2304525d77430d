"""What the emitters of one graph share: its inputs, its dimensions, and what is computed once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.architecture.model import Model
from llmkit.onnx.graph import Graph, Value

AttentionOp = Literal["attention", "flash", "gqa", "mha"]
IN_PLACE: tuple[AttentionOp, ...] = ("gqa", "flash")
"""Ops that write keys and values into the buffer that holds the past ones."""


@dataclass(frozen=True)
class Int8Cache:
    """Keys and values that are kept as codes.

    Attributes:
        scales: those of keys and of values, by layer.
        kind: how GroupQueryAttention calls their shape.
    """

    scales: Sequence[tuple[Value, Value]]
    kind: str


@dataclass
class GraphContext:
    """The inputs of a graph, and values derived from them.

    Attributes:
        graph: the graph.
        model: the architecture bound to its config.
        dtype: the compute dtype, in ONNX's words.
        attention: which op computes attention.
        cache: how keys and values are kept; None: in the compute dtype.
        ids: [B, S] int64, the new tokens.
        mask: [B, T] int64, 1 for real tokens, past ones included.
        positions: [B, S] int64, the place of each new token in its own sequence.
        state: what the runtime hands on from call to call: name of an input -> name of the output.
        initial: the number that such an input holds at first, where that is not zero.
        notes: what layers leave for those after them.
        present: by layer, what the op for attention made of keys and values.
        inputs: what a layer takes besides hidden states, [B, S, width], by its first column (`InputGate.at`).
    """

    graph: Graph
    model: Model
    dtype: str
    attention: AttentionOp
    ids: Value
    mask: Value
    positions: Value
    cache: Int8Cache | None = None
    state: dict[str, str] = field(default_factory=dict)
    initial: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    present: dict[int, tuple[Value, Value]] = field(default_factory=dict)
    inputs: dict[int, Value] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `make`, computed once for each key and shared by all layers."""
        if key not in self._made:
            with self.graph.scope("shared"):
                self._made[key] = make()
        return self._made[key]

    @property
    def cache_dtype(self) -> str:
        """The dtype of keys and values between calls, in ONNX's words."""
        return self.dtype if self.cache is None else "INT8"

    def batch(self) -> Any:
        """B as a vector of one."""
        return self.once("batch", lambda: self.graph.op("Shape", self.ids, start=0, end=1))

    def length(self) -> Any:
        """S as a vector of one."""
        return self.once("length", lambda: self.graph.op("Shape", self.ids, start=1, end=2))

    def total(self) -> Any:
        """T as a vector of one."""
        return self.once("total", lambda: self.graph.op("Shape", self.mask, start=1, end=2))

    def key_positions(self) -> Any:
        """[B, T] int64: the place of each key in its own sequence; 0 for padding."""

        def make() -> Any:
            counted = self.graph.op("CumSum", self.mask, self.graph.ints(1))
            return self.graph.op("Mul", self.graph.op("Sub", counted, self.graph.ints(1)), self.mask)

        return self.once("key positions", make)
