"""Statistics of two models that answered the same questions: what is known of the difference.

Sources: Miller, "Adding error bars to evals", arXiv:2411.00640 (the paired difference, clustered); McNemar 1947, in its
exact form; Agresti and Min 2005 (few flips); Holm 1979; Dutta et al., arXiv:2407.09141 (flips).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from llmkit.evaluation.statistics import LEVEL, MIN_CLUSTERS, Interval, Mean, quantile
from llmkit.lazy_imports import np

N_RESAMPLES = 5000
ALPHA = 1 - LEVEL


def difference_interval(difference: Mean) -> Interval:
    """The 95 % interval of a mean of paired differences, each -1, 0 or 1.

    The standard error is the larger of the clustered and the unclustered one from `MIN_CLUSTERS` subjects on, with
    Student's quantile, and the unclustered one below. One flip is added, half to each side (Agresti and Min), so that
    runs in which few answers changed, or none, are not taken for sure.
    """
    errors = [difference.stderr or 0.0]
    if difference.n_clusters >= MIN_CLUSTERS:
        errors.append(difference.stderr_clustered or 0.0)
    half = quantile(difference.n_clusters) * sqrt(max(errors) ** 2 + 1 / difference.n**2)
    return max(-1.0, difference.value - half), min(1.0, difference.value + half)


def mcnemar(n_to_wrong: int, n_to_right: int) -> float:
    """The two-sided p-value of McNemar's exact test: were flips equally likely to go either way?"""
    n = n_to_wrong + n_to_right
    ways, term = 0, 1
    for i in range(min(n_to_wrong, n_to_right) + 1):
        ways += term
        term = term * (n - i) // (i + 1)
    return min(1.0, float(2 * ways / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, each adjusted so that 5 % bounds the chance of any false one (Holm)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def bootstrap_interval(subjects: Sequence[Sequence[int]], seed: int = 0, n_resamples: int = N_RESAMPLES) -> Interval:
    """The 95 % percentile interval of the mean paired difference, by resampling subjects and then their questions.

    The sum over n questions drawn anew from a subject follows a multinomial law in the shares of -1, 0 and 1 there,
    from which it is drawn at once.

    Args:
        subjects: the differences, -1, 0 or 1, of each subject's questions.
    """
    rng = np.random.default_rng(seed)
    values = np.array([-1, 0, 1])
    counts = np.array([[list(s).count(int(v)) for v in values] for s in subjects])
    sizes = counts.sum(1)
    chosen = rng.integers(len(subjects), size=(n_resamples, len(subjects)))
    drawn = rng.multinomial(sizes[chosen], (counts / sizes[:, None])[chosen])
    means = (drawn @ values).sum(1) / sizes[chosen].sum(1)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def mean_kl(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> float:
    """Mean over questions of sum p ln(p / q), in nats: p and q are the softmax over the choices' log-probabilities.

    Args:
        before, after: log-probabilities of the choices, of the same number of choices in both.
    """
    width = max(map(len, before))
    p, q = (_log_softmax([[*row, *[-np.inf] * (width - len(row))] for row in rows]) for rows in (before, after))
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    return float(terms.sum(-1).mean())


def _log_softmax(rows: Sequence[Sequence[float]]) -> np.ndarray:
    x = np.array(rows, dtype=np.float64)
    x -= x.max(-1, keepdims=True)
    shifted: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return shifted
