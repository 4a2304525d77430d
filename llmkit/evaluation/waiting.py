"""Hidden states that wait for the output head, which reads all its weights for one row as for many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from llmkit.lazy_imports import torch

WAITING_ROWS = 64  # a forward with as many rows does not wait
_WAITING_S = 5.0  # what an interruption by force loses beside the forward that it stops

HeadRead = tuple[int, int, int]
"""(row, query, slot): target `slot` of query `query` is read from row `row`."""


@dataclass
class WaitingRows:
    """Rows of several forwards, and what is read from them."""

    hidden: tuple[torch.Tensor, ...] = ()
    reads: tuple[HeadRead, ...] = ()
    n_rows: int = 0
    since: float = field(default_factory=monotonic)

    def add(self, hidden: torch.Tensor, reads: Sequence[HeadRead]) -> None:
        """The rows of hidden states [T, d] that `reads` are of."""
        rows = sorted({row for row, _, _ in reads})
        at = {row: self.n_rows + i for i, row in enumerate(rows)}
        self.hidden += (hidden[torch.tensor(rows, device=hidden.device)],)
        self.reads += tuple((at[row], query, slot) for row, query, slot in reads)
        self.n_rows += len(rows)

    @property
    def is_late(self) -> bool:
        """Whether the first of them has waited for long."""
        return bool(self.reads) and monotonic() - self.since > _WAITING_S


def in_pieces(reads: Sequence[HeadRead], n_rows: int) -> Iterator[tuple[list[int], list[HeadRead]]]:
    """Reads in groups of at most `n_rows` distinct rows: (the rows, the reads)."""
    rows: list[int] = []
    some: list[HeadRead] = []
    for read in sorted(reads):
        if not rows or read[0] != rows[-1]:
            if len(rows) == n_rows:
                yield rows, some
                rows, some = [], []
            rows.append(read[0])
        some.append(read)
    if rows:
        yield rows, some
