"""Counts and time of one part of a run."""

from __future__ import annotations

from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmkit.evaluation.lm import SharedPrefixLM


class Meter:
    """Counts what a model computes from now on.

    Args:
        lm: the model side.
    """

    def __init__(self, lm: SharedPrefixLM) -> None:
        self._lm = lm
        self._started = perf_counter()
        self._usage, self._truncated = asdict(lm.scorer.usage), lm.n_truncated

    @property
    def elapsed_s(self) -> float:
        """Seconds."""
        return perf_counter() - self._started

    @property
    def tokens(self) -> dict[str, int]:
        """The counts of `Usage`."""
        return {name: count - self._usage[name] for name, count in asdict(self._lm.scorer.usage).items()}

    @property
    def n_truncated(self) -> int:
        """Prompts that lost their beginning."""
        return self._lm.n_truncated - self._truncated
