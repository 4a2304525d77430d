"""A head start: while torch is imported, tensors that are only copied are written by the kernel.

Importing torch keeps one core busy for a second or more and holds the interpreter's lock most of that time, so that no
other thread can run Python. A system call can: `copy_file_range` moves whole stretches of an input file, one call
for many tensors. Tensors in between that are to be computed are copied too and written over later; all workers start
after the copying has ended, and compare what has arrived with the input.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from llmkit.errors import InputError
from llmkit.pipeline.plan import Step
from llmkit.tensors.lazy import Read
from llmkit.tensors.source import SourceFile

MAX_GAP = 32 << 20  # computed bytes between two copied tensors that are copied along
_UNIT = 128 << 20  # bytes of one call: how long the end of the import may have to wait


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of an input file and where they go: `nbytes` from `start` of `source` to `offset` of output `file`."""

    source: SourceFile
    start: int
    file: str
    offset: int
    nbytes: int


def copied_tensor(step: Step) -> Read | None:
    """The stored tensor whose bytes are all that the step writes."""
    origin = step.origin
    return origin if isinstance(origin, Read) and origin.is_moved else None


def find_stretches(steps: Iterable[Step], max_gap: int = MAX_GAP) -> list[Stretch]:
    """Stretches of inputs that lie in the outputs in the same order, with gaps of at most `max_gap`; longest first."""
    copies = [
        Stretch(node.source, node.offset, place.file, place.offset, place.spec.nbytes)
        for step in steps
        if (node := copied_tensor(step)) is not None
        for place in step.placements
    ]
    copies.sort(key=lambda c: (c.file, c.offset))
    stretches: list[Stretch] = []
    for copy in copies:
        last = stretches[-1] if stretches else None
        if (
            last is not None
            and last.source is copy.source
            and last.file == copy.file
            and copy.offset - last.offset == copy.start - last.start
            and copy.offset - (last.offset + last.nbytes) <= max_gap
        ):
            nbytes = copy.offset + copy.nbytes - last.offset
            stretches[-1] = Stretch(last.source, last.start, last.file, last.offset, nbytes)
        else:
            stretches.append(copy)
    return sorted(stretches, key=lambda s: -s.nbytes)


class HeadStart:
    """Copies stretches in a thread while the body of the `with` runs.

    Args:
        stretches: what to copy.
        descriptors: of the output files, by name.
    """

    def __init__(self, stretches: list[Stretch], descriptors: Mapping[str, int]) -> None:
        self._stretches = stretches if hasattr(os, "copy_file_range") else []
        self._descriptors = descriptors
        self._done: list[tuple[str, int, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()  # after the call that is under way
        self._thread.join()

    def has_copied(self, step: Step) -> bool:
        """Whether the bytes of the step were copied to where they belong."""
        return copied_tensor(step) is not None and all(
            any(f == p.file and a <= p.offset and p.offset + p.spec.nbytes <= b for f, a, b in self._done)
            for p in step.placements
        )

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
