"""The numbers that small codes stand for: an even grid, or a table of whole numbers in rising order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llmkit.lazy_imports import torch


@dataclass(frozen=True)
class Points:
    """Points from `lowest` to `highest`: all whole numbers, or those of `table` (of at most eight bits)."""

    lowest: float
    highest: float
    table: tuple[float, ...] | None = None

    @property
    def ends_tried(self) -> list[float]:
        """What the largest number of a group may be put on: near the ends, a little within and beyond them."""
        if self.table is not None:
            return [self.lowest + i for i in range(-7, 8)] + [self.highest + i for i in range(-6, 15, 5)]
        end = self.lowest if self.lowest < 0 else self.highest
        return [end + 0.6 * i for i in range(-3, 4)] if self.lowest < 0 else [end + 0.42 * i for i in range(-5, 6)]

    def nearest_(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest points to float32 numbers of any shape, contiguous, written in their place."""
        if self.table is None:
            return x.round_().clamp_(self.lowest, self.highest)
        places = x.mul_(2).add_(256).clamp_(0, 511).int()
        torch.index_select(self._values_of_halves, 0, places.view(-1), out=x.view(-1))
        return x

    def codes(self, points: torch.Tensor) -> torch.Tensor:
        """Which code stands for each of float32 `points` of any shape, as uint8."""
        if self.table is None:
            return (points - self.lowest).to(torch.uint8)
        places = (points + 128).int()
        return torch.index_select(self._codes_of_values, 0, places.view(-1)).view(points.shape)

    @cached_property
    def _codes_of_values(self) -> torch.Tensor:
        """The code of each point, by the point + 128."""
        return torch.bucketize(torch.arange(-128.0, 128), torch.tensor(self.table)).to(torch.uint8)

    @cached_property
    def _values_of_halves(self) -> torch.Tensor:
        """The nearest point to each of the numbers -128, -127.5, …, 127.5 and up to half above it."""
        table = torch.tensor(self.table, dtype=torch.float32)
        middles = (table[1:] + table[:-1]) / 2
        return table[torch.bucketize(torch.arange(-128, 128, 0.5) + 0.25, middles)]
