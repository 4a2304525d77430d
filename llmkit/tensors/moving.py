"""Nodes that compute nothing: their outputs are the bytes of their inputs in another order.

Importing torch takes longer than converting a model of two gigabytes. Each reordering is therefore written once, for
bytes (`move`). If every node below reorders bytes, too, none needs torch; otherwise `move` works on the bytes of what
torch computed, and its result becomes a tensor again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Bytes, Context, Lazy, Node, Rows
from llmkit.tensors.source import bytes_of, tensor_of
from llmkit.tensors.spec import TensorSpec, form_of


class MoveBytes(Apply):
    """A reordering of bytes within slices of rows.

    Args:
        move: (bytes of the same rows of each input, number of rows) -> bytes of each output.
    """

    def __init__(
        self,
        op: str,
        inputs: Sequence[Lazy],
        specs: TensorSpec | Sequence[TensorSpec],
        move: Callable[[Sequence[memoryview], int], tuple[Bytes, ...]],
        attrs: Mapping[str, Any],
        *,
        row_step: int = 1,
        scratch: float = 0.0,
    ) -> None:
        super().__init__(op, inputs, specs, self._on_tensors, attrs, row_step=row_step, scratch=scratch)
        self._move = move

    @cached_property
    def is_moved(self) -> bool:
        return self.row_step is not None and all(i.node.is_moved for i in self.inputs)

    def move(self, rows: Rows, context: Context) -> tuple[Bytes, ...]:
        # An input of several outputs is moved whole: its other outputs belong to other steps.
        pieces = [context.cut_bytes(lazy, rows) for lazy in self.inputs]
        return self._move(pieces, rows[1] - rows[0])

    def _on_tensors(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n_rows = len(inputs[0])
        moved = self._move([bytes_of(x) for x in inputs], n_rows)
        return tuple(tensor_of(data, spec.with_rows(n_rows)) for data, spec in zip(moved, self.specs, strict=True))


class Gather(Node):
    """Runs of rows [n, …] of several inputs, concatenated; a run is (index of the input, first row, stop)."""

    op = "gather"
    # An input that is no plain row-by-row expression is computed whole, once a step, and cut.
    row_step = 1

    def __init__(self, inputs: Sequence[Lazy], runs: Sequence[tuple[int, int, int]]) -> None:
        first = inputs[0].spec
        for lazy in inputs[1:]:
            if lazy.shape[1:] != first.shape[1:] or lazy.dtype is not first.dtype:
                raise SpecError(f"cannot {self.op} rows of {first} and {lazy.spec}")
        self.inputs = tuple(inputs)
        self.runs = tuple(runs)
        self.n_rows = sum(stop - start for _, start, stop in runs)
        self.specs = (first.with_rows(self.n_rows),)
        self.attrs = {"runs": len(self.runs)}

    @cached_property
    def is_moved(self) -> bool:
        return all(i.node.is_moved for i in self.inputs)

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return (tensor_of(self.move(rows, context)[0], self.specs[0].of_rows(rows)),)

    def move(self, rows: Rows, context: Context) -> tuple[Bytes, ...]:
        pieces, at = [], 0
        for index, start, stop in self.runs:
            low, high = max(rows[0], at), min(rows[1], at + stop - start)
            if low < high:
                pieces.append(context.cut_bytes(self.inputs[index], (start + low - at, start + high - at)))
            at += stop - start
        return (pieces[0] if len(pieces) == 1 else bytearray().join(pieces),)

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return Gather(inputs, self.runs).output()

    def peak_nbytes(self, n_rows: int) -> int:
        computed = [i.node for i in self.inputs if i.node.row_step != 1 or len(i.node.specs) > 1]
        return sum(node.peak_nbytes(node.n_rows) for node in computed) + 2 * self.slice_nbytes(n_rows)

    def form(self) -> object:
        return form_of((type(self), self.runs, *[(i.origin.form(), i.index) for i in self.inputs]))

    def _identity(self) -> str:
        return hashlib.sha256(repr(self.runs).encode()).hexdigest()


class Concat(Gather):
    """Tensors [n_i, …] of one dtype, concatenated along the first dimension."""

    op = "concat"

    def __init__(self, parts: Sequence[Lazy]) -> None:
        super().__init__(parts, [(i, 0, part.spec.n_rows) for i, part in enumerate(parts)])
        self.attrs = {}

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return Concat(inputs).output()


class TakeRows(Node):
    """Rows `start:stop` of a tensor [n, …]."""

    op = "rows"

    def __init__(self, lazy: Lazy, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= lazy.spec.n_rows:
            raise SpecError(f"rows {start}:{stop} are outside {lazy.spec}")
        self.inputs = (lazy,)
        self.start = start
        self.n_rows = stop - start
        self.specs = (lazy.spec.with_rows(self.n_rows),)
        self.attrs = {"start": start, "stop": stop}
        step = lazy.node.row_step if len(lazy.node.specs) == 1 else None
        is_slice = step and start % step == 0 and (stop % step == 0 or stop == lazy.node.n_rows)
        self.row_step = step if is_slice else None

    @property
    def is_moved(self) -> bool:
        return self.row_step is not None and self.inputs[0].node.is_moved

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        low, high = rows[0] + self.start, rows[1] + self.start
        if self.row_step is None:
            return (context.whole(self.inputs[0])[low:high],)
        return (context.rows(self.inputs[0], (low, high)),)

    def move(self, rows: Rows, context: Context) -> tuple[Bytes, ...]:
        return (context.cut_bytes(self.inputs[0], (rows[0] + self.start, rows[1] + self.start)),)

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return TakeRows(inputs[0], self.start, self.start + self.n_rows).output()

    def peak_nbytes(self, n_rows: int) -> int:
        inner = self.inputs[0].node
        return inner.peak_nbytes(n_rows if self.row_step is not None else inner.n_rows)


class Stack(Node):
    """Tensors of one shape and dtype, stacked along a new first dimension: each is a row."""

    op = "stack"
    row_step = 1

    def __init__(self, parts: Sequence[Lazy]) -> None:
        first = parts[0].spec
        if any(part.spec != first for part in parts):
            raise SpecError(f"cannot {self.op} {' and '.join(dict.fromkeys(str(part.spec) for part in parts))}")
        self.inputs = tuple(parts)
        self.n_rows = len(parts)
        self.specs = (TensorSpec(first.dtype, (len(parts), *first.shape)),)
        self.attrs = {}

    @cached_property
    def is_moved(self) -> bool:
        return all(i.node.is_moved for i in self.inputs)

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return (torch.stack([context.rows(x, (0, x.node.n_rows)) for x in self.inputs[slice(*rows)]]),)

    def move(self, rows: Rows, context: Context) -> tuple[Bytes, ...]:
        return (bytearray().join([context.row_bytes(x, (0, x.node.n_rows)) for x in self.inputs[slice(*rows)]]),)

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return Stack(inputs).output()

    def peak_nbytes(self, n_rows: int) -> int:
        return max(x.node.peak_nbytes(x.node.n_rows) for x in self.inputs) + 2 * self.slice_nbytes(n_rows)
