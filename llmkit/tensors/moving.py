"""Bytes that only move: expressions of reads, cuts and reorderings, evaluated without torch.

Importing torch takes longer than converting a model of two gigabytes. Where a whole plan only moves bits, the runner
takes the bytes of each step from here. Reorderings say how to move bytes by being `Moved` nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.tensors.lazy import Apply, Concat, Lazy, Node, Read, Rows, TakeRows
from llmkit.tensors.spec import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Gathered", "Moved", "Mover", "is_moved"]

Bytes = bytes | memoryview
# Gets the bytes of each input's rows and the number of rows; gives the bytes of each output.
MoveBytes = Callable[[Sequence[memoryview], int], tuple[Bytes, ...]]


class Moved(Apply):
    """What can be done to bytes as well as to tensors, row by row (`move`, `fn`): mostly a reordering of elements."""

    def __init__(
        self,
        op: str,
        inputs: Sequence[Lazy],
        specs: TensorSpec | Sequence[TensorSpec],
        fn: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        move: MoveBytes,
        attrs: dict[str, Any],
        *,
        row_step: int = 1,
        scratch: float = 0.0,
    ) -> None:
        super().__init__(op, inputs, specs, fn, attrs, row_step=row_step, scratch=scratch)
        self.move = move


class Gathered(Node):
    """Runs (input, start, stop) of rows of the inputs, one below the other."""

    runs: tuple[tuple[int, int, int], ...]


def is_moved(node: Node) -> bool:
    """Whether the node's data is bytes of files in another order, row by row."""
    if isinstance(node, Read):
        return node.strides is None
    if not isinstance(node, Moved | Gathered | Concat | TakeRows):
        return False
    return node.row_step is not None and all(is_moved(i.node) for i in node.inputs)


class Mover:
    """Evaluates the moved nodes of one step.

    Args:
        observe: sees the rows of each read and their bytes.
    """

    def __init__(self, observe: Callable[[Read, Rows, Bytes], None]) -> None:
        self._observe = observe
        self._whole: dict[int, tuple[memoryview, ...]] = {}

    def evaluate(self, node: Node, rows: Rows) -> tuple[memoryview, ...]:
        """The bytes of each output for rows `rows` of the node's row space."""
        if isinstance(node, Read):
            spec = node.specs[0]
            start, nbytes = (0, spec.nbytes) if not spec.shape else (rows[0], (rows[1] - rows[0]) * spec.row_nbytes)
            data = node.source.read_into(node.offset + start * spec.row_nbytes, nbytes)
            self._observe(node, rows, data)
            return (data,)
        if isinstance(node, TakeRows):
            return (self._rows(node.inputs[0], (rows[0] + node.start, rows[1] + node.start)),)
        if isinstance(node, Concat):
            return (self._runs(node.inputs, [(i, 0, part.spec.n_rows) for i, part in enumerate(node.inputs)], rows),)
        if isinstance(node, Gathered):
            return (self._runs(node.inputs, node.runs, rows),)
        if isinstance(node, Moved):
            inputs = [self._rows(lazy, rows) for lazy in node.inputs]
            return tuple(memoryview(piece) for piece in node.move(inputs, rows[1] - rows[0]))
        raise TypeError(f"{node.op} is no movement of bytes")

    def _runs(self, inputs: Sequence[Lazy], runs: Sequence[tuple[int, int, int]], rows: Rows) -> memoryview:
        pieces, at = [], 0
        for index, start, stop in runs:
            low, high = max(rows[0], at), min(rows[1], at + stop - start)
            if low < high:
                pieces.append(self._rows(inputs[index], (start + low - at, start + high - at)))
            at += stop - start
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _rows(self, lazy: Lazy, rows: Rows) -> memoryview:
        node = lazy.node
        step = node.row_step or 1
        if rows[0] % step == 0 and (rows[1] % step == 0 or rows[1] == node.n_rows) and len(node.specs) == 1:
            return self.evaluate(node, rows)[lazy.index]
        # A node whose slices do not fall on these rows (its steps are longer) is moved whole, once a step, and cut.
        if id(node) not in self._whole:
            self._whole[id(node)] = self.evaluate(node, (0, node.n_rows))
        size = lazy.spec.row_nbytes
        return self._whole[id(node)][lazy.index][rows[0] * size : rows[1] * size]
