"""The sessions of one graph, each opened when it is first needed.

Scoring needs logits at few places, which are known after the layers have run: it uses two sessions, one for the body
and one for the head. Generation needs the logits of the last column alone: it uses a third session, one call a token.
Each of them holds its weights in memory, so a session is opened only when somebody calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmkit.errors import InputError
from llmkit.lazy_imports import onnx, torch
from llmkit.onnx.binding import ELEMENTS, BoundSession
from llmkit.onnx.split import HIDDEN, last_column, split_head

_MOST_ELEMENTS = 2**40  # of an end without its free dimensions: with them, sizes still fit 64 bits
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_TORCH = {"FLOAT": "float32", "DOUBLE": "float64"}


def torch_name(kind: str) -> str:
    """Torch's name of a dtype in ONNX's words."""
    return _TORCH.get(kind, kind.lower())


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph: torch's name of its dtype, and its dimensions by number or name."""

    dtype: str
    shape: tuple[int | str, ...]


class Parts:
    """A graph and the sessions that run it.

    Args:
        graph: the ONNX model; its weights may lie in files.
        start: opens a session of a serialized part; None stands for the whole graph.
        device: where inputs and outputs are.

    Attributes:
        metadata: what the exporter says of the graph.
        inputs, outputs: of the whole graph; an input with a default value in the graph is a weight.
        is_divided: it is marked where its head begins: without that, the body is all of it.
    """

    def __init__(self, graph: onnx.ModelProto, start: Callable[[bytes | None], Any], device: torch.device) -> None:
        self._graph, self._start, self.device = graph, start, device
        self.metadata = {entry.key: entry.value for entry in graph.metadata_props}
        held = {tensor.name for tensor in graph.graph.initializer}
        self.inputs = {value.name: _port(value) for value in graph.graph.input if value.name not in held}
        self.outputs = {value.name: _port(value) for value in graph.graph.output}
        self.is_divided = HIDDEN in self.metadata
        if (reason := self._refused()) is not None:
            raise InputError(f"the graph cannot be run: {reason}", hint="export the model again")

    def _refused(self) -> str | None:
        """Why no parts can be made of it: its tensors, its logits, or the value that it marks as entering the head."""
        for name, port in {**self.inputs, **self.outputs}.items():
            if port.dtype not in ELEMENTS:
                return f"its {name[:60]} is of type {port.dtype}"
        if (logits := self.outputs.get("logits")) is None:
            return "it has no output named logits"
        if len(logits.shape) != 3 or not isinstance(logits.shape[2], int):
            return f"its logits are of shape {list(logits.shape)[:9]}, expected [batch, sequence, a number of tokens]"
        if "float" not in logits.dtype:
            return f"its logits are {logits.dtype}, expected floats"
        if sized := [n for n in TOKEN_INPUTS if n in self.inputs and not _takes_any(self.inputs[n].shape)]:
            shape = self.inputs[sized[0]].shape
            return f"its {sized[0]} is of shape {list(shape)[:9]}, expected [batch, sequence] as names"
        if not self.is_divided:
            return None
        entry, size = self.metadata[HIDDEN], self.metadata.get("llmkit.hidden_size", "")
        if not any(entry in node.input for node in self._graph.graph.node):
            return f"no node reads {entry[:60]!r}, which {HIDDEN} names"
        if not (size.isascii() and size.isdigit() and len(size) < 10):
            return f"llmkit.hidden_size is {size[:60]!r}, expected a number"
        dtype = self.metadata.get("llmkit.dtype", "")
        if dtype not in onnx.TensorProto.DataType.keys():  # noqa: SIM118 - no mapping
            return f"llmkit.dtype is {dtype[:60]!r}"
        return None

    @cached_property
    def body(self) -> BoundSession:
        """From tokens to what enters the head; to logits where the graph is not divided."""
        return self._opened(self._halves[0] if self.is_divided else None)

    @cached_property
    def head(self) -> BoundSession:
        """From there to logits."""
        return self._opened(self._halves[1])

    @cached_property
    def last(self) -> BoundSession:
        """From tokens to the logits of the last column, [B, 1, vocab]."""
        return self._opened(last_column(self._graph))

    @cached_property
    def _halves(self) -> tuple[bytes, bytes]:
        return split_head(self._graph)

    def _opened(self, part: bytes | None) -> BoundSession:
        return BoundSession(self._start(part), self.device)


def _takes_any(shape: tuple[int | str, ...]) -> bool:
    """Whether it is [B, S] with sizes that a call chooses; a batch of one is called row by row."""
    return len(shape) == 2 and (isinstance(shape[0], str) or shape[0] == 1) and isinstance(shape[1], str)


def _port(value: onnx.ValueInfoProto) -> Port:
    number = value.type.tensor_type.elem_type
    if number not in onnx.TensorProto.DataType.values():
        raise InputError(f"the graph's {value.name} is of element type {number}, which is not known")
    kind = onnx.TensorProto.DataType.Name(number)
    dims = value.type.tensor_type.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)
    sizes = [n for n in shape if isinstance(n, int)]
    if min(sizes, default=0) < 0 or math.prod(sizes) >= _MOST_ELEMENTS:
        raise InputError(f"the graph's {value.name} is of shape {list(shape)[:9]}", hint="export the model again")
    return Port(torch_name(kind), shape)
