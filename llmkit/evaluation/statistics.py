"""Means over questions, subjects and categories, with standard errors.

Definitions, for subjects i = 1…k with n_i questions of which a share a_i is right:

- standard error of a subject: sqrt(a_i (1 - a_i) / (n_i - 1)), the sample standard deviation of the 0/1 scores over
  sqrt(n_i), as lm-eval computes it; undefined (None) for a single question.
- micro: every question counts the same, sum(n_i a_i) / sum(n_i). This is what MMLU's authors, LLaMA and lm-eval report.
- macro: every subject counts the same, sum(a_i) / k. This is what C-Eval's authors and the first leaderboards report.
- macro over categories: every category's macro counts the same.
- The standard error of any of them is that of a weighted mean of independent subjects, sqrt(sum(w_i² se_i²)) with
  w_i = n_i / sum(n), 1 / k, or 1 / (categories · subjects of the category): the questions of a subject are taken as a
  sample, the list of subjects as given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of 0/1 scores or other per-question values.

    Attributes:
        value: the mean, a share between 0 and 1 for accuracies.
        stderr: its standard error; None where it is undefined (a part with a single question).
        n: questions behind it.
    """

    value: float
    stderr: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """As a JSON object."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


def mean(scores: Sequence[float]) -> Mean:
    """The mean of one subject's per-question scores."""
    n = len(scores)
    average = fsum(scores) / n
    if n < 2:
        return Mean(average, None, n)
    variance = fsum((x - average) ** 2 for x in scores) / (n - 1)
    return Mean(average, sqrt(variance / n), n)


def micro(subjects: Iterable[Mean]) -> Mean:
    """Every question counts the same."""
    subjects = list(subjects)
    total = sum(s.n for s in subjects)
    return _weighted([(s, s.n / total) for s in subjects])


def macro(subjects: Iterable[Mean]) -> Mean:
    """Every subject counts the same."""
    subjects = list(subjects)
    return _weighted([(s, 1 / len(subjects)) for s in subjects])


def macro_of_groups(groups: Mapping[str, Sequence[Mean]]) -> Mean:
    """Every group's macro counts the same; groups without subjects are left out."""
    filled = [subjects for subjects in groups.values() if subjects]
    return _weighted([(s, 1 / (len(filled) * len(subjects))) for subjects in filled for s in subjects])


def _weighted(parts: Sequence[tuple[Mean, float]]) -> Mean:
    stderr: float | None = None
    if all(s.stderr is not None for s, _ in parts):
        stderr = sqrt(fsum((w * (s.stderr or 0.0)) ** 2 for s, w in parts))
    return Mean(fsum(s.value * w for s, w in parts), stderr, sum(s.n for s, _ in parts))
