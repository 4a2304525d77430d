"""Runs compared with the first one: differences with intervals, flips, and the plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.evaluation.record import RunRecord
from llmkit.report.table import PlotTable


@dataclass(frozen=True, slots=True)
class ComparisonView:
    """Two runs over one benchmark."""

    title: str
    sentence: str
    facts: Sequence[tuple[str, str]]
    table: PlotTable


def comparisons(records: Sequence[RunRecord], names: Sequence[str]) -> list[ComparisonView]:
    """Of each run with the first one, over each benchmark that both have."""
    return []
