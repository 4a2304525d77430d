"""Lazy tensors: small frozen expressions whose specs are known at once and whose data is computed on demand.

A `Lazy` is one output of a `Node`. A node says what it computes (`op`, `attrs`), from which inputs, and in which row
slices it may be computed: the runner evaluates a huge matrix in slices fixed by the plan, and a slice gives the same
bits as the whole. Nothing here knows of models, file formats or transforms.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import lcm
from typing import Any, Protocol

from llmkit.lazy_imports import torch
from llmkit.tensors.context import Bytes, Context, ReadObserver, Rows
from llmkit.tensors.source import SourceFile, bytes_of
from llmkit.tensors.spec import DType, TensorSpec, form_of

__all__ = ["Apply", "Bytes", "Context", "Lazy", "Node", "Read", "ReadObserver", "Rows", "reads_below"]


class Node(ABC):
    """One computation with one or several outputs.

    Attributes:
        op: what it computes, in one word.
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

    @property
    def node(self) -> Node:
        """Itself."""
        return self

    @property
    def sample(self) -> Node:
        """Itself (see `Origin.sample`)."""
        return self

    @property
    def is_moved(self) -> bool:
        """Whether the outputs are bytes of files, reordered within row slices: then `move` gives them without torch."""
        return False

    def move(self, rows: Rows, context: Context) -> tuple[Bytes, ...]:
        """The bytes of all outputs for rows `rows`, if the node `is_moved`."""
        raise TypeError(f"{self.op} is no movement of bytes")

    @abstractmethod
    def peak_nbytes(self, n_rows: int) -> int:
        """Upper estimate of the memory in use while `n_rows` rows are computed, outputs included."""

    def output_rows(self, index: int, rows: Rows) -> Rows:
        """The rows of output `index` that a slice of the row space yields."""
        return rows

    def over(self, inputs: Sequence[Lazy]) -> Lazy | None:
        """The same reordering of rows applied to other inputs; None for a node that does more than reorder rows."""
        return None

    def widest_inputs(self) -> Iterable[Lazy]:
        """The inputs that count, besides the outputs, for the size of a slice."""
        return self.inputs

    def slice_nbytes(self, n_rows: int) -> int:
        """Bytes of the outputs of `n_rows` rows."""
        total = 0
        for i, spec in enumerate(self.specs):
            start, stop = self.output_rows(i, (0, min(n_rows, self.n_rows)))
            total += (stop - start) * spec.row_nbytes
        return total

    def form(self) -> object:
        """Equal for nodes that are computed in the same slices and need the same memory, whatever their values."""
        return self

    def fingerprint(self) -> str:
        """A digest of the expression (not of the data): op, parameters, specs and inputs."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = self._digest([i.origin.fingerprint() for i in self.inputs], self._identity())
        return self._fingerprint

    def content_fingerprint(self, contents: Mapping[Node, str]) -> str:
        """A digest of the expression and of the data, wherever the files lie; `contents` has a digest of each read."""
        return self._digest([i.node.content_fingerprint(contents) for i in self.inputs], self._identity())

    def _digest(self, inputs: Sequence[str], identity: str) -> str:
        operands = [(digest, i.index) for digest, i in zip(inputs, self.inputs, strict=True)]
        body = (self.op, dict(self.attrs), [str(s) for s in self.specs], identity, operands)
        return hashlib.sha256(repr(body).encode()).hexdigest()

    def _identity(self) -> str:
        return ""

    def output(self, index: int = 0) -> Lazy:
        """Output `index` as a lazy tensor."""
        return Lazy(self, index)

    def outputs(self) -> tuple[Lazy, ...]:
        """All outputs as lazy tensors; they are siblings, computed and written together."""
        return tuple(Lazy(self, i) for i in range(len(self.specs)))


class Origin(Protocol):
    """What a tensor is an output of: a node, or a deferred one, built on first use (`llmkit.tensors.alike`)."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Dtype and shape of each output."""

    @property
    def inputs(self) -> tuple[Lazy, ...]:
        """The tensors it is computed from."""

    @property
    def node(self) -> Node:
        """The node; a deferred one is built now."""

    @property
    def sample(self) -> Node:
        """A node of the same form that is built already."""

    def form(self) -> object:
        """As `Node.form`."""

    def fingerprint(self) -> str:
        """As `Node.fingerprint`."""


class Lazy:
    """A tensor that is known by its spec and computed by `load`.

    Attributes:
        spec: dtype and shape.
        index: which output of its node it is.
        origin: the node, or what builds it; siblings share it, which tells them without building the node.
    """

    __slots__ = ("index", "origin", "spec")

    def __init__(self, origin: Origin, index: int = 0) -> None:
        self.origin = origin
        self.index = index
        self.spec = origin.specs[index]

    @property
    def node(self) -> Node:
        """The node it is an output of."""
        return self.origin.node

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self.spec.shape

    def load(self) -> torch.Tensor:
        """Compute the tensor, in the dtype and shape of its spec. Nothing else reads data."""
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
        return reads_below([self.origin])

    def __repr__(self) -> str:
        return f"Lazy({self.formula()}: {self.spec})"


def reads_below(origins: Iterable[Origin]) -> list[Read]:
    """Every file read below some nodes, in order, each once."""
    reads: dict[Origin, None] = {}
    seen: set[Origin] = set()
    for root in origins:
        leaves = [i.origin for i in root.inputs] or [root]
        if not any(leaf.inputs for leaf in leaves):  # as in most of a hundred thousand
            reads.update(dict.fromkeys(leaves))
            continue
        pending = [root]
        while pending:
            origin = pending.pop()
            if not origin.inputs:
                reads[origin] = None
            elif origin not in seen:
                seen.add(origin)
                pending.extend([i.origin for i in reversed(origin.inputs)])
    return [origin for origin in reads if isinstance(origin, Read)]


class Read(Node):
    """A tensor stored in a file, contiguous or strided (then only read whole)."""

    op = "read"
    inputs = ()

    def __init__(
        self, name: str, spec: TensorSpec, source: SourceFile, offset: int, strides: tuple[int, ...] | None = None
    ) -> None:
        self.name = name
        self.specs = (spec,)
        self.source = source
        self.offset = offset
        self.strides = strides

    @property
    def n_rows(self) -> int:  # type: ignore[override]  # of a hundred thousand few are asked
        return self.specs[0].n_rows

    @property
    def row_step(self) -> int | None:  # type: ignore[override]
        return 1 if self.strides is None else None

    @property
    def is_moved(self) -> bool:
        return self.strides is None

    @property
    def attrs(self) -> Mapping[str, Any]:  # type: ignore[override]  # made when they are shown
        return {"file": str(self.source.path), "tensor": self.name}

    @property
    def span_nbytes(self) -> int:
        """Bytes of the file from the first element to the last."""
        (spec,) = self.specs
        if self.strides is None or not spec.numel:
            return spec.nbytes
        return (1 + sum((n - 1) * s for n, s in zip(spec.shape, self.strides, strict=True))) * spec.dtype.itemsize

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        spec = self.specs[0]
        dtype = spec.dtype.torch
        if self.strides is not None:
            flat = self.source.read_tensor(self.offset, self.span_nbytes // spec.dtype.itemsize, dtype)
            data = flat.as_strided(spec.shape, self.strides).contiguous()
        else:
            part = spec.of_rows(rows)
            flat = self.source.read_tensor(self.offset + rows[0] * spec.row_nbytes, part.numel, dtype)
            data = flat.view(part.shape)
        if context.observe is not None:
            context.observe(self, rows, bytes_of(data))
        return (data,)

    def move(self, rows: Rows, context: Context) -> tuple[Bytes, ...]:
        spec = self.specs[0]
        data = self.source.read_into(self.offset + rows[0] * spec.row_nbytes, spec.of_rows(rows).nbytes)
        if context.observe is not None:
            context.observe(self, rows, data)
        return (data,)

    def peak_nbytes(self, n_rows: int) -> int:
        return self.slice_nbytes(n_rows) * (1 if self.strides is None else 2)

    def form(self) -> object:
        return self.specs[0].form if self.strides is None else form_of((Read, self.specs[0].form, self.strides))

    @property
    def place(self) -> str:
        """File and offset, as text."""
        return f"{self.source.fingerprint()}@{self.offset}"

    def fingerprint(self) -> str:
        return f"{self.place}:{self.strides}:{self.specs[0]}"

    def content_fingerprint(self, contents: Mapping[Node, str]) -> str:
        return f"{contents[self]}:{self.specs[0]}:{self.strides}"


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

    def _combined_step(self, step: int | None) -> int | None:
        if step is None:
            return None
        steps = [step]
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

    def form(self) -> object:
        inputs = tuple([(i.origin.form(), i.index) for i in self.inputs])
        return form_of((type(self), self.specs, inputs, self._in, self._out, self.row_step, self.scratch))

    def peak_nbytes(self, n_rows: int) -> int:
        held = peak = widest = 0
        for lazy, per in zip(self.inputs, self._in, strict=True):
            n = lazy.node.n_rows if per == 0 or n_rows >= self.n_rows else -(-n_rows // per)
            peak = max(peak, held + lazy.node.peak_nbytes(n))
            held += lazy.node.slice_nbytes(n)
            if per:
                widest = max(widest, lazy.node.slice_nbytes(n) // lazy.dtype.itemsize * 4)
        return max(peak, held + self.slice_nbytes(n_rows) + int(self.scratch * widest))
