"""Statistics of paired answers against scipy's and statsmodels' figures, brute force and simulation."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest

from llmkit.evaluation.paired import bootstrap_interval, difference_interval, holm, mcnemar, mean_kl
from llmkit.evaluation.statistics import mean, micro


@pytest.mark.parametrize(
    ("to_wrong", "to_right", "expected"),  # statsmodels 0.15, mcnemar(exact=True)
    [
        (0, 0, 1.0),
        (6, 0, 0.03125),
        (4, 9, 0.266845703125),
        (41, 23, 0.0327657590988232),
        (300, 250, 0.036578745549102676),
        (10, 10, 1.0),
    ],
)
def test_mcnemars_test_is_statsmodels(to_wrong, to_right, expected):
    assert mcnemar(to_wrong, to_right) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(to_right, to_wrong) == mcnemar(to_wrong, to_right)


def test_mcnemars_test_counts_outcomes_as_unlikely():
    """Of all ways in which 9 flips can go, those at least as far from even as 2 to 7."""
    outcomes = [sum(ways) for ways in product((0, 1), repeat=9)]
    assert mcnemar(2, 7) == pytest.approx(sum(o <= 2 or o >= 7 for o in outcomes) / 2**9)


def test_holms_adjustment_is_statsmodels():
    assert holm([0.01, 0.04, 0.03, 0.005, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])  # multipletests
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_divergence_of_choices_is_scipys():
    p = [
        [-1.558444, -1.870239, -0.624516, -2.303295],
        [-0.646201, -2.035944, -2.94935, -1.227459],
        [-2.648711, -1.550798, -1.865956, -0.575487],
    ]
    q = [
        [-0.723812, -5.868641, -1.284784, -1.445778],
        [-4.002196, -5.602303, -2.594105, -0.101676],
        [-1.210209, -0.722262, -2.08838, -2.382439],
    ]
    assert mean_kl(p, q) == pytest.approx(1.1191099741520427, abs=1e-5)  # scipy.stats.entropy
    moved = [[x - 3.0 for x in row] for row in q]  # the choices need not have all of the probability
    assert mean_kl(p, moved) == pytest.approx(mean_kl(p, q))
    assert mean_kl([*p, [-1.0, -1.0]], [*q, [-1.0, -1.0]]) == pytest.approx(mean_kl(p, q) * 3 / 4)
    assert mean_kl([[0.0, -np.inf]], [[-0.5, -1.0]]) > 0


def test_few_flips_are_not_taken_for_sure():
    """As the interval of Agresti and Min: half a pair added to each of the four cells."""
    for n, down, up in ((200, 4, 0), (200, 6, 0), (1000, 30, 12), (60, 0, 0)):
        change = mean([-1.0] * down + [1.0] * up + [0.0] * (n - down - up))
        b, c, m = down + 0.5, up + 0.5, n + 2
        half = 1.959964 * np.sqrt((b + c) - (b - c) ** 2 / m) / m
        assert difference_interval(change) == pytest.approx(((c - b) / m - half, (c - b) / m + half), abs=4 / n**1.5)
        assert (difference_interval(change)[1] < 0) == (mcnemar(down, up) < 0.05)


def exact_coverage(n: int, down: float, up: float) -> float:
    """The share of all outcomes of n pairs in whose interval the true difference lies."""
    total = 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            low, high = difference_interval(mean([-1.0] * a + [1.0] * b + [0.0] * (n - a - b)))
            if low <= up - down <= high:
                total += comb(n, a) * comb(n - a, b) * down**a * up**b * (1 - down - up) ** (n - a - b)
    return total


@pytest.mark.parametrize(("n", "down", "up"), [(24, 0.05, 0.05), (24, 0.3, 0.1), (24, 0.02, 0.0)])
def test_intervals_of_one_subject_hold_the_true_difference(n, down, up):
    assert 0.935 <= exact_coverage(n, down, up) <= 1


@pytest.mark.parametrize("k", [5, 20])
def test_intervals_hold_the_difference_that_subjects_scatter_around(k):
    rng = np.random.default_rng(5)
    held = [0, 0]
    for _ in range(300):
        shift = rng.normal(-0.03, 0.04, k)
        subjects = [
            rng.choice([-1, 0, 1], p=[0.08 - s / 2, 0.84, 0.08 + s / 2], size=40) for s in shift.clip(-0.15, 0.1)
        ]
        low, high = difference_interval(micro(mean(s.tolist()) for s in subjects))
        held[0] += low <= -0.03 <= high
        low, high = bootstrap_interval([s.tolist() for s in subjects], n_resamples=300)
        held[1] += low <= -0.03 <= high
    assert held[0] / 300 >= 0.93
    assert held[1] / 300 >= 0.92


def test_the_bootstrap_draws_subjects_and_then_questions():
    """As a plain loop over resampled questions does; the seed decides all."""
    rng = np.random.default_rng(2)
    subjects = [rng.choice([-1, 0, 1], p=[0.2, 0.7, 0.1], size=n).tolist() for n in (12, 40, 25)]
    means = []
    for _ in range(4000):
        chosen = [rng.choice(subjects[i], size=len(subjects[i])) for i in rng.integers(3, size=3)]
        means.append(np.concatenate(chosen).mean())
    assert bootstrap_interval(subjects) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.012)
    assert bootstrap_interval(subjects, seed=1) == bootstrap_interval(subjects, seed=1) != bootstrap_interval(subjects)
