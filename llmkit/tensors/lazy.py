"""Lazy tensors: small frozen expressions whose specs are known at once and whose data is computed on demand.

A `Lazy` is one output of a `Node`. A node says what it computes (`op`, `attrs`), from which inputs, and in which row
slices it may be computed: the runner evaluates a huge matrix in slices fixed by the plan, and a slice gives the same
bits as the whole. Nothing here knows of models, file formats or transforms.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.errors import SpecError
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Apply", "Concat", "Context", "Lazy", "Node", "Read", "ReadObserver", "TakeRows"]

Rows = tuple[int, int]


class ReadObserver(Protocol):
    """Sees every row slice that is read from an input file (the runner hashes them)."""

    def __call__(self, node: Read, rows: Rows, data: torch.Tensor) -> None:
        """`data` holds rows `rows` of `node`."""


class Context:
    """What one step remembers while it runs: whole inputs of sliced steps, and siblings within one slice.

    `is_stopped` tells a long step to raise `Stopped`; `report` is told what it is at, in words; `workspace`: a folder
    for what it keeps (None: in memory).
    """

    workspace: Path | None = None
    report: Callable[[str], None] = staticmethod(lambda text: None)

    def __init__(self, observe: ReadObserver | None = None, is_stopped: Callable[[], bool] = lambda: False) -> None:
        self.observe, self.is_stopped = observe, is_stopped
        self._whole: dict[int, tuple[torch.Tensor, ...]] = {}
        self._slice: dict[tuple[int, Rows], tuple[torch.Tensor, ...]] = {}

    def next_slice(self) -> None:
        """Forget the siblings of the previous slice."""
        self._slice.clear()

    def whole(self, lazy: Lazy) -> torch.Tensor:
        """The whole of `lazy`, computed once a step."""
        node = lazy.node
        if id(node) not in self._whole:
            self._whole[id(node)] = node.evaluate((0, node.n_rows), self)
        return self._whole[id(node)][lazy.index]

    def rows(self, lazy: Lazy, rows: Rows) -> torch.Tensor:
        """Rows `rows` (in the node's row space) of `lazy`."""
        node = lazy.node
        if len(node.specs) == 1:
            return node.evaluate(rows, self)[0]
        key = (id(node), rows)
        if key not in self._slice:
            self._slice[key] = node.evaluate(rows, self)
        return self._slice[key][lazy.index]


class Node(ABC):
    """One computation with one or several outputs.

    Attributes:
        op: what it does, in one word.
        specs: dtype and shape of each output.
        inputs: the lazies it reads.
        attrs: JSON-able parameters, shown by `explain` and part of the digest.
        n_rows: length of the row space (the first dimension of the outputs that are sliced one to one).
        row_step: slices may start at multiples of this; None when only the whole can be computed.
    """

    op: str
    specs: tuple[TensorSpec, ...]
    inputs: tuple[Lazy, ...]
    attrs: Mapping[str, Any]
    n_rows: int
    row_step: int | None

    @abstractmethod
    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        """All outputs for rows `rows` of the row space."""

    @abstractmethod
    def peak_nbytes(self, n_rows: int) -> int:
        """Upper estimate of the memory in use while `n_rows` rows are computed, outputs included."""

    def output_rows(self, index: int, rows: Rows) -> Rows:
        """The rows of output `index` that a slice of the row space yields."""
        return rows

    def over(self, inputs: Sequence[Lazy]) -> Lazy | None:
        """Other inputs with their rows moved in the same way; None for a node that does more than move rows."""
        return None

    def widest_inputs(self) -> Iterable[Lazy]:
        """What slices are measured by, besides the outputs."""
        return self.inputs

    def slice_nbytes(self, n_rows: int) -> int:
        """Bytes of the outputs of `n_rows` rows."""
        total = 0
        for i, spec in enumerate(self.specs):
            start, stop = self.output_rows(i, (0, min(n_rows, self.n_rows)))
            total += (stop - start) * spec.row_nbytes
        return total

    def fingerprint(self) -> str:
        """A digest of the expression (not of the data): op, parameters, specs and inputs."""
        cached = getattr(self, "_fingerprint", None)
        if cached is None:
            body: list[Any] = [self.op, dict(self.attrs), [str(s) for s in self.specs], self._identity()]
            body += [[i.node.fingerprint(), i.index] for i in self.inputs]
            cached = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            self._fingerprint: str = cached
        return cached

    def _identity(self) -> str:
        return ""

    def output(self, index: int = 0) -> Lazy:
        """Output `index` as a lazy tensor."""
        return Lazy(self, index)

    def outputs(self) -> tuple[Lazy, ...]:
        """All outputs as lazy tensors; they are siblings, computed and written together."""
        return tuple(Lazy(self, i) for i in range(len(self.specs)))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Lazy:
    """A tensor that is known by its spec and computed by `load`."""

    node: Node
    index: int = 0

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return self.node.specs[self.index]

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self.spec.shape

    def load(self) -> torch.Tensor:
        """Compute the whole tensor. Nothing else reads data."""
        return Context().rows(self, (0, self.node.n_rows))

    def cast(self, dtype: DType) -> Lazy:
        """This tensor in another dtype (itself when it already has it)."""
        if dtype is self.dtype:
            return self
        target = dtype
        return Apply(
            "cast", [self], self.spec.with_dtype(dtype), lambda x: x.to(target.torch), {"to": dtype.name}
        ).output()

    def formula(self) -> str:
        """The expression in one line: `add(base:model.norm.weight, delta:model.norm.weight)`."""
        if isinstance(self.node, Read):
            return f"{self.node.source.path.parent.name}/{self.node.name}"
        inside = [i.formula() for i in self.node.inputs] + [f"{k}={v}" for k, v in self.node.attrs.items()]
        return f"{self.node.op}({', '.join(inside)})"

    def reads(self) -> list[Read]:
        """Every file read below this expression, in order, each once."""
        found: dict[int, Read] = {}
        pending: list[Node] = [self.node]
        while pending:
            node = pending.pop()
            if isinstance(node, Read):
                found.setdefault(id(node), node)
            pending.extend(i.node for i in reversed(node.inputs))
        return list(found.values())

    def __repr__(self) -> str:
        return f"Lazy({self.formula()}: {self.spec})"


class Read(Node):
    """A tensor stored in a file, contiguous or strided (then only read whole)."""

    op = "read"

    def __init__(
        self, name: str, spec: TensorSpec, source: SourceFile, offset: int, strides: tuple[int, ...] | None = None
    ) -> None:
        self.name = name
        self.specs = (spec,)
        self.inputs = ()
        self.source = source
        self.offset = offset
        self.strides = strides
        self.n_rows = spec.n_rows
        self.row_step = 1 if strides is None else None
        self.attrs = {"file": str(source.path), "tensor": name}

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        spec = self.specs[0]
        dtype = spec.dtype.torch
        if self.strides is not None:
            span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, self.strides, strict=True)) if spec.numel else 0
            flat = self.source.read_tensor(self.offset, span, dtype)
            data = flat.as_strided(spec.shape, self.strides).contiguous()
        else:
            start, stop = rows
            n = spec.numel if not spec.shape else (stop - start) * (spec.numel // max(spec.n_rows, 1))
            flat = self.source.read_tensor(self.offset + start * spec.row_nbytes, n, dtype)
            data = flat.view(spec.shape if not spec.shape else (stop - start, *spec.shape[1:]))
        if context.observe is not None:
            context.observe(self, rows, data)
        return (data,)

    def peak_nbytes(self, n_rows: int) -> int:
        return self.slice_nbytes(n_rows) * (1 if self.strides is None else 2)

    def _identity(self) -> str:
        return f"{self.source.fingerprint()}@{self.offset}:{self.strides}"


class Apply(Node):
    """A function of tensors that works row by row, or (`row_step=None`) only on the whole.

    Args:
        op: one word for `explain`.
        inputs: operands.
        specs: one spec, or several for a group of siblings.
        fn: receives one tensor an input (row slices where sliced), returns a tensor, or a tuple for a group.
        attrs: JSON-able parameters.
        row_step: slices start at multiples of it; None computes the whole at once.
        input_rows: for each input how many rows of the row space one row of it covers: 1 slices it one to one,
            8 gives one row for eight, 0 hands over the whole each time. Default 1 for all.
        output_rows: the same for each output; 0 is a constant, complete in the first slice.
        scratch: memory that `fn` needs besides inputs and outputs, in multiples of the float32 size of the largest
            sliced operand.
    """

    def __init__(
        self,
        op: str,
        inputs: Sequence[Lazy],
        specs: TensorSpec | Sequence[TensorSpec],
        fn: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        attrs: Mapping[str, Any] | None = None,
        *,
        row_step: int | None = 1,
        input_rows: Sequence[int] | None = None,
        output_rows: Sequence[int] | None = None,
        scratch: float = 0.0,
    ) -> None:
        self.op = op
        self.inputs = tuple(inputs)
        self.specs = (specs,) if isinstance(specs, TensorSpec) else tuple(specs)
        self.fn = fn
        self.attrs = dict(attrs or {})
        self.scratch = scratch
        self._in = tuple(input_rows) if input_rows is not None else (1,) * len(self.inputs)
        self._out = tuple(output_rows) if output_rows is not None else (1,) * len(self.specs)
        rows = [s.n_rows for s, per in zip(self.specs, self._out, strict=True) if per == 1]
        rows += [x.spec.n_rows for x, per in zip(self.inputs, self._in, strict=True) if per == 1]
        self.n_rows = rows[0] if rows else 1
        self.row_step = self._combined_step(row_step)

    def _combined_step(self, own: int | None) -> int | None:
        if own is None:
            return None
        steps = [own]
        for lazy, per in zip(self.inputs, self._in, strict=True):
            if per:
                if lazy.node.row_step is None:
                    return None
                steps.append(lazy.node.row_step * per)
        return lcm(*steps)

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        args = []
        is_whole = rows == (0, self.n_rows)
        for lazy, per in zip(self.inputs, self._in, strict=True):
            if per == 0:
                args.append(context.whole(lazy))
            elif is_whole:
                args.append(context.rows(lazy, (0, lazy.node.n_rows)))
            else:
                args.append(context.rows(lazy, (rows[0] // per, -(-rows[1] // per))))
        result = self.fn(*args)
        return result if isinstance(result, tuple) else (result,)

    def output_rows(self, index: int, rows: Rows) -> Rows:
        per = self._out[index]
        if per == 0 or rows == (0, self.n_rows):
            return (0, self.specs[index].n_rows if rows[0] == 0 else 0)
        return (rows[0] // per, -(-rows[1] // per))

    def peak_nbytes(self, n_rows: int) -> int:
        held = peak = widest = 0
        for lazy, per in zip(self.inputs, self._in, strict=True):
            n = lazy.node.n_rows if per == 0 or n_rows >= self.n_rows else -(-n_rows // per)
            peak = max(peak, held + lazy.node.peak_nbytes(n))
            held += lazy.node.slice_nbytes(n)
            if per:
                widest = max(widest, lazy.node.slice_nbytes(n) // lazy.dtype.itemsize * 4)
        return max(peak, held + self.slice_nbytes(n_rows) + int(self.scratch * widest))


class Concat(Node):
    """Tensors one below the other (along the first dimension)."""

    op = "concat"

    def __init__(self, parts: Sequence[Lazy]) -> None:
        first = parts[0].spec
        for part in parts[1:]:
            if part.shape[1:] != first.shape[1:] or part.dtype is not first.dtype:
                raise SpecError(f"cannot concatenate {first} and {part.spec}")
        self.inputs = tuple(parts)
        self.n_rows = sum(p.spec.n_rows for p in parts)
        self.specs = (first.with_rows(self.n_rows),)
        self.attrs = {}
        # A part that is no plain row-by-row expression is computed whole, once a step, and cut.
        self.row_step = 1

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        import torch

        pieces, start = [], 0
        for part in self.inputs:
            stop = start + part.spec.n_rows
            low, high = max(rows[0], start), min(rows[1], stop)
            if low < high:
                local = (low - start, high - start)
                if part.node.row_step == 1 and len(part.node.specs) == 1:
                    pieces.append(context.rows(part, local))
                else:
                    pieces.append(context.whole(part)[local[0] : local[1]])
            start = stop
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces),)

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return Concat(inputs).output()

    def peak_nbytes(self, n_rows: int) -> int:
        whole = [p for p in self.inputs if p.node.row_step != 1]
        held = sum(p.node.peak_nbytes(p.node.n_rows) for p in whole)
        return held + 2 * self.slice_nbytes(n_rows)


class TakeRows(Node):
    """Rows `start:stop` of a tensor."""

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
        self.row_step = step if step is not None and start % step == 0 else None

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        low, high = rows[0] + self.start, rows[1] + self.start
        if self.row_step is None:
            return (context.whole(self.inputs[0])[low:high],)
        return (context.rows(self.inputs[0], (low, high)),)

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return TakeRows(inputs[0], self.start, self.start + self.n_rows).output()

    def peak_nbytes(self, n_rows: int) -> int:
        inner = self.inputs[0].node
        return inner.peak_nbytes(n_rows if self.row_step is not None else inner.n_rows)
