"""Tensors that are made together, all at once, by a function that reads what it needs itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Context, Lazy, Node, Rows
from llmkit.tensors.spec import TensorSpec


class Whole(Node):
    """One computation of several tensors that has no slices.

    Args:
        compute: gets the step's context, and gives the tensors.
        peak_nbytes: what it takes besides them; asked for when the plan is complete.
    """

    def __init__(
        self,
        op: str,
        inputs: Sequence[Lazy],
        specs: Sequence[TensorSpec],
        compute: Callable[[Context], Sequence[torch.Tensor]],
        attrs: Mapping[str, Any],
        *,
        peak_nbytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.op, self.inputs, self.specs, self.attrs = op, tuple(inputs), tuple(specs), attrs
        self.n_rows, self.row_step = specs[0].n_rows, None
        self._compute, self._peak_nbytes = compute, peak_nbytes

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return tuple(self._compute(context))

    def output_rows(self, index: int, rows: Rows) -> Rows:
        return (0, self.specs[index].n_rows)

    def peak_nbytes(self, n_rows: int) -> int:
        return self.slice_nbytes(n_rows) + self._peak_nbytes()
