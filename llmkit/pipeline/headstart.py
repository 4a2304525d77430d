"""A head start: while torch is imported, tensors that only move go to the output inside the kernel.

Importing torch keeps one core busy for a second or more and holds the interpreter's lock most of that time, so that no
other thread can run Python. A system call can: `copy_file_range` moves whole stretches of an input file, one call
for many tensors. Tensors in between that are to be computed are copied too and written over later; all workers start
after the copying has ended.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from llmkit.errors import InputError
from llmkit.pipeline.plan import Plan, Step
from llmkit.tensors.lazy import Read
from llmkit.tensors.source import SourceFile

__all__ = ["HeadStart", "Stretch", "find_stretches", "moved_tensor"]

MAX_GAP = 32 << 20  # computed bytes between two moved tensors that are copied along
_UNIT = 128 << 20  # bytes of one call: how long the end of the import may have to wait


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of an input file and where they go: `nbytes` from `start` of `source` to `offset` of output `file`."""

    source: SourceFile
    start: int
    file: str
    offset: int
    nbytes: int


def moved_tensor(step: Step) -> Read | None:
    """The stored tensor whose bytes are all that the step writes."""
    node = step.node
    if not isinstance(node, Read) or node.strides is not None or len(step.placements) > 1:
        return None
    return node


def find_stretches(plan: Plan, max_gap: int = MAX_GAP) -> list[Stretch]:
    """Stretches of inputs that lie in the outputs in the same order, with gaps of at most `max_gap`; longest first."""
    moves = []
    for step in plan.steps:
        node = moved_tensor(step)
        if node is not None:
            place = step.placements[0]
            moves.append(Stretch(node.source, node.offset, place.file, place.offset, place.spec.nbytes))
    moves.sort(key=lambda m: (m.file, m.offset))
    found: list[Stretch] = []
    for move in moves:
        last = found[-1] if found else None
        if (
            last is not None
            and last.source is move.source
            and last.file == move.file
            and move.offset - last.offset == move.start - last.start
            and move.offset - (last.offset + last.nbytes) <= max_gap
        ):
            nbytes = move.offset + move.nbytes - last.offset
            found[-1] = Stretch(last.source, last.start, last.file, last.offset, nbytes)
        else:
            found.append(move)
    return sorted(found, key=lambda s: -s.nbytes)


class HeadStart:
    """Copies stretches in a thread until it is told to end.

    Args:
        stretches: what to copy.
        descriptors: of the output files, by name.
    """

    def __init__(self, stretches: list[Stretch], descriptors: Mapping[str, int]) -> None:
        self._stretches = stretches
        self._descriptors = descriptors
        self._done: list[tuple[str, int, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def begin(self) -> None:
        """Start copying."""
        if self._stretches and hasattr(os, "copy_file_range"):
            self._thread.start()

    def end(self) -> None:
        """Stop after the call that is under way."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def has_moved(self, step: Step) -> bool:
        """Whether the bytes of the step are where they belong."""
        if moved_tensor(step) is None:
            return False
        place = step.placements[0]
        stop = place.offset + place.spec.nbytes
        return any(f == place.file and a <= place.offset and stop <= b for f, a, b in self._done)

    def _copy(self) -> None:
        for stretch in self._stretches:
            copied = self._copy_one(stretch)
            self._done.append((stretch.file, stretch.offset, stretch.offset + copied))
            if copied < stretch.nbytes:
                return

    def _copy_one(self, stretch: Stretch) -> int:
        """The bytes copied: fewer when it shall end, or cannot go on (the ordinary way then says why)."""
        copied = 0
        try:
            source, target = stretch.source.fileno(), self._descriptors[stretch.file]
            while copied < stretch.nbytes and not self._ended.is_set():
                n = min(stretch.nbytes - copied, _UNIT)
                n = os.copy_file_range(source, target, n, stretch.start + copied, stretch.offset + copied)
                if n == 0:
                    break
                copied += n
        except (OSError, InputError):
            pass
        return copied
