"""Two lazy tensors read side by side, a few rows at a time."""

from __future__ import annotations

from math import lcm

from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Context, Lazy, Rows


def common_slices(a: Lazy, b: Lazy, slice_nbytes: int) -> list[Rows]:
    """Row slices of near `slice_nbytes` in which two tensors of one shape can be computed, in order.

    One slice of all rows where one of them can only be computed whole.
    """
    n = a.spec.n_rows
    steps = [x.node.row_step for x in (a, b)]
    if None in steps or any(x.node.n_rows != n or len(x.node.specs) > 1 for x in (a, b)):
        return [(0, n)]
    step = lcm(*(s for s in steps if s is not None))
    rows = max(slice_nbytes // max(a.spec.row_nbytes, 1) // step, 1) * step
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def load_rows(lazy: Lazy, rows: Rows) -> torch.Tensor:
    """Rows `start:stop` of a tensor, [stop - start, …]; computed alone where these are not all."""
    return lazy.load() if rows == (0, lazy.spec.n_rows) else Context().rows(lazy, rows)
