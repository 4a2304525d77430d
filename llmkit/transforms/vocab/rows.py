"""Nodes that make rows of an embedding from the old one, in slices, with the same bits whatever the slices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Context, Lazy, Node, Rows
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.spec import DType, TensorSpec

# Rows that are read at a time where a whole matrix passes by (a mean): near 2 MiB of a 4096-wide bfloat16 one.
BLOCK_ROWS = 256


class MakeRows(Node):
    """Rows made by a function of the row numbers and of lazies that it reads itself.

    Args:
        fn: (rows, context of the step) -> those rows, of the dtype and width of the spec.
        held: bytes that stay in memory beside the rows themselves.
        row_step: 1, or None when only the whole can be computed (it is then computed once a step).
    """

    def __init__(
        self,
        op: str,
        spec: TensorSpec,
        fn: Callable[[Rows, Context], torch.Tensor],
        inputs: Sequence[Lazy] = (),
        attrs: Mapping[str, Any] | None = None,
        *,
        held: int = 0,
        row_step: int | None = 1,
    ) -> None:
        self.op = op
        self.specs = (spec,)
        self.fn = fn
        self.inputs = tuple(inputs)
        self.attrs = dict(attrs or {})
        self.n_rows = spec.n_rows
        self.row_step = row_step
        self.held = held

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return (self.fn(rows, context),)

    def peak_nbytes(self, n_rows: int) -> int:
        inner = [i.node.peak_nbytes(min(BLOCK_ROWS, i.node.n_rows)) for i in self.inputs]
        # float32 beside the dtype of the rows
        widened = self.slice_nbytes(n_rows) * (1 + 4 // self.specs[0].dtype.itemsize)
        return self.held + max(inner, default=0) + widened


def digest_of(data: Any) -> str:
    """A short digest of plain data, for the attributes of a node."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def row_slices(n_rows: int) -> list[Rows]:
    """The fixed row slices of a matrix, as (start, stop)."""
    return [(start, min(start + BLOCK_ROWS, n_rows)) for start in range(0, n_rows, BLOCK_ROWS)]


def arranged(matrix: Lazy, old_of: Sequence[int | None], new_rows: Lazy | None) -> Lazy:
    """A matrix [len(old_of), …] whose row i is row old_of[i] of `matrix`; for None the next row of `new_rows`."""
    runs: list[tuple[Lazy, int, int]] = []
    n_made = 0
    for old in old_of:
        source, row = (matrix, old) if old is not None or new_rows is None else (new_rows, n_made)
        if row is None:
            raise SpecError("a row is wanted that neither the old matrix nor new rows give")
        n_made += old is None
        if runs and runs[-1][0] is source and runs[-1][2] == row:
            runs[-1] = (source, runs[-1][1], row + 1)
        else:
            runs.append((source, row, row + 1))
    if len(runs) > _MAX_RUNS:
        return _picked(matrix, old_of, new_rows)
    parts = [s if (a, b) == (0, s.spec.n_rows) else TakeRows(s, a, b).output() for s, a, b in runs]
    return parts[0] if len(parts) == 1 else Concat(parts).output()


# Beyond this a Concat would spend more time on its list of parts than on the rows.
_MAX_RUNS = 16


def _picked(matrix: Lazy, old_of: Sequence[int | None], new_rows: Lazy | None) -> Lazy:
    """As `arranged`, in blocks: rows that are near each other in the file are read together."""
    order = [0]
    for old in old_of:
        order.append(order[-1] + (old is None))

    def compute(rows: Rows, context: Context) -> torch.Tensor:
        wanted = old_of[rows[0] : rows[1]]
        out = torch.empty((len(wanted), *matrix.shape[1:]), dtype=matrix.dtype.torch)
        fresh = [i for i, old in enumerate(wanted) if old is None]
        if fresh and new_rows is not None:
            out[fresh] = context.cut(new_rows, (order[rows[0]], order[rows[1]]))
        gather(context, matrix, [(i, old) for i, old in enumerate(wanted) if old is not None], out)
        return out

    inputs = [matrix] if new_rows is None else [matrix, new_rows]
    attrs = {"rows": len(old_of), "of": matrix.spec.n_rows, "sha256": digest_of(list(old_of))}
    return MakeRows("pick_rows", matrix.spec.with_rows(len(old_of)), compute, inputs, attrs).output()


def gather(context: Context, matrix: Lazy, wanted: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
    """Fill out[i] with row `old` of `matrix`, cast to its dtype, for each (i, old); small gaps are read as well."""
    pending = sorted(wanted, key=lambda item: item[1])
    first = 0
    while first < len(pending):
        last = first
        while (
            last + 1 < len(pending)
            and pending[last + 1][1] - pending[last][1] <= _GAP
            and pending[last + 1][1] - pending[first][1] < BLOCK_ROWS
        ):
            last += 1
        start, stop = pending[first][1], pending[last][1] + 1
        block = context.cut(matrix, (start, stop))
        chosen = pending[first : last + 1]
        out[[i for i, _ in chosen]] = block[[old - start for _, old in chosen]].to(out.dtype)
        first = last + 1


_GAP = 4


def column_mean(matrix: Lazy) -> Lazy:
    """[n, …] -> the mean over the rows, [1, …] in float32, summed in float64."""

    def compute(_: Rows, context: Context) -> torch.Tensor:
        total = torch.zeros((1, *matrix.shape[1:]), dtype=torch.float64)
        for start, stop in row_slices(matrix.spec.n_rows):
            total += context.cut(matrix, (start, stop)).double().sum(0, keepdim=True)
        return (total / matrix.spec.n_rows).float()

    spec = TensorSpec(DType.F32, (1, *matrix.shape[1:]))
    held = BLOCK_ROWS * matrix.spec.row_nbytes // matrix.dtype.itemsize * 8
    attrs = {"over": matrix.spec.n_rows}
    return MakeRows("mean_of_rows", spec, compute, [matrix], attrs, held=held, row_step=None).output()
