"""The state of one step while it runs: inputs that were computed, and the observer of what is read from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmkit.tensors.source import bytes_of
from llmkit.tensors.stopped import stop_of_thread

if TYPE_CHECKING:
    import torch

    from llmkit.tensors.lazy import Lazy, Read

Rows = tuple[int, int]
Bytes = bytes | bytearray | memoryview


class ReadObserver(Protocol):
    """Sees every row slice that is read from an input file (the runner hashes them)."""

    def __call__(self, node: Read, rows: Rows, data: Bytes) -> None:
        """`data` are the bytes of rows `rows` of `node`."""


class Context:
    """The state of one step: inputs that are computed whole are cached for the step, siblings for one slice.

    Inputs come as tensors (`rows`, `cut`, `whole`) or as their bytes (`row_bytes`, `cut_bytes`); the bytes of a node
    that `is_moved` need no torch.

    Attributes:
        observe: sees what is read from files.
        is_stopped: whether the run was stopped that the thread it is made in computes for.
        report: is told in words what the step is doing.
        workspace: a folder for intermediate results; None keeps them in memory.
    """

    workspace: Path | None = None
    report: Callable[[str], None] = staticmethod(lambda text: None)

    def __init__(self, observe: ReadObserver | None = None) -> None:
        self.observe, self.is_stopped = observe, stop_of_thread()
        self._whole: dict[int, tuple[torch.Tensor, ...]] = {}
        self._slice: dict[tuple[int, Rows], tuple[torch.Tensor, ...]] = {}
        self._whole_bytes: dict[int, tuple[Bytes, ...]] = {}
        self._slice_bytes: dict[tuple[int, Rows], tuple[Bytes, ...]] = {}

    def next_slice(self) -> None:
        """Forget the siblings of the previous slice."""
        self._slice.clear()
        self._slice_bytes.clear()

    def whole(self, lazy: Lazy) -> torch.Tensor:
        """All of `lazy`, in its spec's dtype and shape; computed once a step."""
        node = lazy.node
        if id(node) not in self._whole:
            self._whole[id(node)] = node.evaluate((0, node.n_rows), self)
        return self._whole[id(node)][lazy.index]

    def rows(self, lazy: Lazy, rows: Rows) -> torch.Tensor:
        """Rows `rows` (in the node's row space) of `lazy`: [rows, …] in its dtype."""
        node = lazy.node
        if len(node.specs) == 1:
            return node.evaluate(rows, self)[0]
        key = (id(node), rows)
        if key not in self._slice:
            self._slice[key] = node.evaluate(rows, self)
        return self._slice[key][lazy.index]

    def row_bytes(self, lazy: Lazy, rows: Rows) -> memoryview:
        """The bytes of rows `rows` (in the node's row space, where its slices may lie) of `lazy`."""
        node = lazy.node
        if not node.is_moved:
            return bytes_of(self.rows(lazy, rows))
        if len(node.specs) == 1:
            return memoryview(node.move(rows, self)[0])
        key = (id(node), rows)
        if key not in self._slice_bytes:
            self._slice_bytes[key] = node.move(rows, self)
        return memoryview(self._slice_bytes[key][lazy.index])

    def cut(self, lazy: Lazy, rows: Rows) -> torch.Tensor:
        """Any rows of `lazy`: computed alone, or cut from the whole where its node is not computed row by row."""
        if lazy.node.row_step == 1 and len(lazy.node.specs) == 1:
            return self.rows(lazy, rows)
        return self.whole(lazy)[rows[0] : rows[1]]

    def cut_bytes(self, lazy: Lazy, rows: Rows) -> memoryview:
        """The bytes of any rows of `lazy`."""
        node, size = lazy.node, lazy.spec.row_nbytes
        if not node.is_moved:
            return bytes_of(self.cut(lazy, rows))
        step = node.row_step or 1
        is_slice = rows[0] % step == 0 and (rows[1] % step == 0 or rows[1] == node.n_rows)
        if is_slice and len(node.specs) == 1:
            return self.row_bytes(lazy, rows)
        if id(node) not in self._whole_bytes:
            self._whole_bytes[id(node)] = node.move((0, node.n_rows), self)
        return memoryview(self._whole_bytes[id(node)][lazy.index])[rows[0] * size : rows[1] * size]
