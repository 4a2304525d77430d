"""Whether two lazy tensors hold the same values, read in slices until the first difference."""

from __future__ import annotations

import math

from llmkit.tensors.lazy import Context, Lazy, Read

__all__ = ["are_equal"]

_SLICE_NBYTES = 2**22


def are_equal(a: Lazy, b: Lazy, limit: int | None = None) -> bool | None:
    """Whether two tensors have one shape and one value at each place; dtypes may differ.

    Two reads of one place in a file are equal unread. The last and the first rows are compared first: trained tokens
    are there.

    Args:
        limit: at most this many bytes are read of each, spread over the whole.

    Returns:
        None where all that was read is equal and the limit left some rows unread.
    """
    if a.shape != b.shape:
        return False
    if a.node is b.node and a.index == b.index:
        return True
    x, y = a.node, b.node
    if isinstance(x, Read) and isinstance(y, Read) and _place(x) == _place(y):
        return True
    step = math.lcm(x.row_step or 0, y.row_step or 0)
    n = x.n_rows
    slice_nbytes = _SLICE_NBYTES if limit is None else min(_SLICE_NBYTES, max(limit // 16, 1))
    rows = n if step == 0 else max(slice_nbytes // max(a.spec.row_nbytes, 1) // step, 1) * step
    starts = list(range(0, n, max(rows, 1)))
    chosen = starts[-1:] + starts[:-1]
    if limit is not None:
        most = max(limit // max(rows * a.spec.row_nbytes, 1), 2)
        stride = -(-len(starts) // most)
        chosen = list(dict.fromkeys([*starts[-1:], *starts[::stride]]))
    for start in chosen:
        if not _has_equal_rows(a, b, (start, min(start + rows, n))):
            return False
    return None if len(chosen) < len(starts) else True


def _place(node: Read) -> tuple[object, ...]:
    return str(node.source.path), node.offset, node.specs, node.strides


def _has_equal_rows(a: Lazy, b: Lazy, rows: tuple[int, int]) -> bool:
    x, y = a.node, b.node
    if isinstance(x, Read) and isinstance(y, Read) and a.dtype is b.dtype and x.strides is y.strides is None:
        # Bytes, so that opening a checkpoint needs no torch.
        start, nbytes = rows[0] * a.spec.row_nbytes, (rows[1] - rows[0]) * a.spec.row_nbytes
        return x.source.read(x.offset + start, nbytes) == y.source.read(y.offset + start, nbytes)
    import torch

    return torch.equal(Context().rows(a, rows).float(), Context().rows(b, rows).float())
