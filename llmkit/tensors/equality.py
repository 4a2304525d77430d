"""Whether two lazy tensors hold the same values, read in slices until the first difference."""

from __future__ import annotations

from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Context, Lazy, Read, Rows
from llmkit.tensors.slices import common_slices, load_rows

_SLICE_NBYTES = 2**22


def are_equal(a: Lazy, b: Lazy, limit: int | None = None) -> bool | None:
    """Whether two tensors, of any shape and dtype, have equal shapes and elements; dtypes may differ.

    Two reads of the same place in a file are equal without reading. The last slice, of added tokens, comes first.

    Args:
        limit: read at most this many bytes of each tensor, spread over its rows.

    Returns:
        None if everything read is equal, and the limit left rows unread.
    """
    if a.shape != b.shape:
        return False
    if a.node is b.node and a.index == b.index:
        return True
    x, y = a.node, b.node
    if isinstance(x, Read) and isinstance(y, Read) and _place(x) == _place(y):
        return True
    slice_nbytes = _SLICE_NBYTES if limit is None else min(_SLICE_NBYTES, max(limit // 16, 1))
    slices = common_slices(a, b, slice_nbytes)
    chosen = slices[-1:] + slices[:-1]
    if limit is not None and slices:
        most = max(limit // max(slices[0][1] * a.spec.row_nbytes, 1), 2)
        every = -(-len(slices) // most)
        chosen = list(dict.fromkeys([*slices[-1:], *slices[::every]]))
    if not all(_has_equal_rows(a, b, rows) for rows in chosen):
        return False
    return None if len(chosen) < len(slices) else True


def _place(node: Read) -> tuple[object, ...]:
    return str(node.source.path), node.offset, node.specs, node.strides


def _has_equal_rows(a: Lazy, b: Lazy, rows: Rows) -> bool:
    if a.node.is_moved and b.node.is_moved and a.dtype is b.dtype:  # opening a checkpoint needs no torch
        return Context().row_bytes(a, rows) == Context().row_bytes(b, rows)
    return torch.equal(load_rows(a, rows).float(), load_rows(b, rows).float())
