"""Several lazy tensors as outputs of one node, so that what they have in common is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING

from llmkit.tensors.lazy import Context, Lazy, Node, Read, Rows

if TYPE_CHECKING:
    import torch

__all__ = ["siblings"]


def siblings(lazies: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The same tensors; those that depend on a node of several outputs are computed and written together,
    and constants with them.

    Without it each would be a step of its own, and the node computed in all of them.
    """
    if sum(_has_group(lazy.node) for lazy in lazies.values()) < 2:
        return dict(lazies)
    together = [name for name, lazy in lazies.items() if _has_group(lazy.node) or _is_constant(lazy)]
    return dict(lazies) | dict(zip(together, _Siblings([lazies[name] for name in together]).outputs(), strict=True))


def _has_group(node: Node) -> bool:
    return len(node.specs) > 1 or any(_has_group(lazy.node) for lazy in node.inputs)


def _is_constant(lazy: Lazy) -> bool:
    return not lazy.node.inputs and not isinstance(lazy.node, Read)


class _Siblings(Node):
    op = "together"

    def __init__(self, lazies: Sequence[Lazy]) -> None:
        self.inputs = tuple(lazies)
        self.specs = tuple(lazy.spec for lazy in lazies)
        self.attrs = {}
        sliced = [lazy for lazy in lazies if not _is_constant(lazy)]
        self.n_rows = sliced[0].node.n_rows
        steps = [lazy.node.row_step for lazy in sliced]
        self.row_step = None if None in steps else lcm(*(s for s in steps if s is not None))

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        return tuple(
            context.whole(lazy) if _is_constant(lazy) else context.rows(lazy, self._rows_of(lazy, rows))
            for lazy in self.inputs
        )

    def _rows_of(self, lazy: Lazy, rows: Rows) -> Rows:
        """The same rows in the row space of one: another only where all are computed whole."""
        return (0, lazy.node.n_rows) if rows == (0, self.n_rows) else rows

    def output_rows(self, index: int, rows: Rows) -> Rows:
        lazy = self.inputs[index]
        if _is_constant(lazy):  # complete in the first slice
            return (0, lazy.spec.n_rows if rows[0] == 0 else 0)
        return lazy.node.output_rows(lazy.index, self._rows_of(lazy, rows))

    def widest_inputs(self) -> list[Lazy]:
        found, pending = [], list(self.inputs)
        while pending:
            lazy = pending.pop()
            found.append(lazy)
            pending.extend(lazy.node.inputs)
        return found

    def peak_nbytes(self, n_rows: int) -> int:
        return max(x.node.peak_nbytes(n_rows) for x in self.inputs) + self.slice_nbytes(n_rows)
