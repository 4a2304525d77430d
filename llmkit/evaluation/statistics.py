"""Means over questions, subjects and categories, with standard errors.

Definitions, for subjects i = 1…k with n_i questions of which a share a_i is right:

- standard error of a subject: sqrt(a_i (1 - a_i) / (n_i - 1)), the sample standard deviation of the 0/1 scores over
  sqrt(n_i), as lm-eval computes it; undefined (None) for a single question.
- micro: every question counts the same, sum(n_i a_i) / sum(n_i). This is what MMLU's authors, LLaMA and lm-eval report.
- macro: every subject counts the same, sum(a_i) / k. This is what C-Eval's authors and the first leaderboards report.
- macro over categories: every category's macro counts the same.
- The standard error of any of them takes the questions of a subject as a sample and the list of subjects as given: that
  of a weighted mean of independent subjects, sqrt(sum(w_i² se_i²)) with w_i = n_i / sum(n), 1 / k, or
  1 / (categories · subjects of the category).
- The standard error clustered by subject takes the subjects as a sample, too, so that it tells what other subjects
  might have given: sqrt(sum over subjects of (sum of weighted residuals)²), which is sqrt(sum((w_i (a_i - a))²)), and
  for micro (1/n²) Σ_clusters (Σ residuals)² under the root (Miller, "Adding error bars to evals", arXiv:2411.00640).
- The 95 % interval of a share is Wilson's, for the number of independent questions that would have its standard error:
  min(n, a (1 - a) / se²) (Korn and Graubard 1998; compared with others by Dean and Pagano 2015). From `MIN_CLUSTERS`
  subjects on se is the clustered one, and the quantile Student's with k - 1 degrees of freedom; below that there are
  too few to tell of others, and se is the unclustered one with the normal quantile. For a subject it is plain Wilson.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import NormalDist
from typing import Any

LEVEL = 0.95
MIN_CLUSTERS = 5

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of 0/1 scores or other per-question values.

    Attributes:
        value: the mean, a share between 0 and 1 for accuracies.
        stderr: its standard error; None where it is undefined (a part with a single question).
        n: questions behind it; 0 where that is not known.
        stderr_clustered: its standard error clustered by subject; None for the mean of one subject.
        n_clusters: subjects behind it.
    """

    value: float
    stderr: float | None
    n: int
    stderr_clustered: float | None = None
    n_clusters: int = 1

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of a share; None where the values are no shares, or one has no standard error or number."""
        if not 0 <= self.value <= 1 or not self.n:
            return None
        spread = self.value * (1 - self.value)
        stderr = self.stderr if self.n_clusters < MIN_CLUSTERS else self.stderr_clustered
        if self.n_clusters == 1 or not spread or stderr == 0:
            return wilson(self.value, self.n, quantile(self.n_clusters))
        if stderr is None:
            return None
        return wilson(self.value, min(self.n, spread / stderr**2), quantile(self.n_clusters))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        body = {"value": self.value, "stderr": self.stderr, "n": self.n}
        if self.stderr_clustered is not None:
            body["stderr_clustered"] = self.stderr_clustered
        return body | {"interval": self.interval}


def wilson(share: float, n: float, z: float = NormalDist().inv_cdf((1 + LEVEL) / 2)) -> Interval:
    """Wilson's score interval (1927) of a share of `n` independent trials, `z` standard deviations to each side."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def quantile(n_clusters: int) -> float:
    """How many standard errors the 95 % interval goes to each side, by how many clusters the error was estimated from.

    Student's quantile with one degree of freedom less, by the expansion of Abramowitz and Stegun 26.7.5 (within 0.001
    from 4 degrees of freedom on); the normal one below `MIN_CLUSTERS`, where errors are not clustered.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    if n_clusters < MIN_CLUSTERS:
        return z
    v = n_clusters - 1
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


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
    value = fsum(s.value * w for s, w in parts)
    stderr: float | None = None
    if all(s.stderr is not None for s, _ in parts):
        stderr = sqrt(fsum((w * (s.stderr or 0.0)) ** 2 for s, w in parts))
    clustered = sqrt(fsum((w * (s.value - value)) ** 2 for s, w in parts)) if len(parts) > 1 else None
    return Mean(value, stderr, sum(s.n for s, _ in parts), clustered, len(parts))
