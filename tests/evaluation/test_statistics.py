"""Averages and standard errors against numpy, lm-eval, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.evaluation.statistics import Mean, macro, macro_of_groups, mean, micro, quantile, wilson


def scores(seed, n, rate):
    return (np.random.default_rng(seed).random(n) < rate).astype(float)


def test_a_subject_is_its_mean_with_the_sample_standard_error():
    xs = scores(0, 57, 0.4)
    got = mean(xs.tolist())
    assert got.value == pytest.approx(xs.mean())
    assert got.stderr == pytest.approx(xs.std(ddof=1) / np.sqrt(57))
    assert got.n == 57


def test_the_standard_error_is_lm_evals():
    from lm_eval.api.metrics import mean_stderr

    xs = scores(1, 100, 0.7).tolist()
    assert mean(xs).stderr == pytest.approx(mean_stderr(xs))


def test_micro_weighs_questions_and_macro_weighs_subjects():
    parts = [scores(i, n, r) for i, (n, r) in enumerate([(10, 0.2), (100, 0.5), (40, 0.9)])]
    subjects = [mean(p.tolist()) for p in parts]
    assert micro(subjects).value == pytest.approx(np.concatenate(parts).mean())
    assert macro(subjects).value == pytest.approx(np.mean([p.mean() for p in parts]))
    assert micro(subjects).n == macro(subjects).n == 150


def test_standard_errors_of_averages_are_what_repeated_draws_scatter():
    rng = np.random.default_rng(7)
    sizes, rates = [30, 120, 60], [0.3, 0.6, 0.8]
    micros, macros, errors = [], [], []
    for _ in range(1500):
        subjects = [mean((rng.random(n) < r).astype(float).tolist()) for n, r in zip(sizes, rates, strict=True)]
        micros.append(micro(subjects).value)
        macros.append(macro(subjects).value)
        errors.append((micro(subjects).stderr, macro(subjects).stderr))
    mean_errors = np.mean(errors, axis=0)
    assert mean_errors[0] == pytest.approx(np.std(micros), rel=0.08)
    assert mean_errors[1] == pytest.approx(np.std(macros), rel=0.08)


def test_the_average_of_categories_counts_each_category_once():
    a, b, c = Mean(0.2, 0.1, 10), Mean(0.4, 0.2, 10), Mean(0.9, 0.3, 10)
    got = macro_of_groups({"x": [a, b], "y": [c], "empty": []})
    assert got.value == pytest.approx((0.3 + 0.9) / 2)
    assert got.stderr == pytest.approx(np.sqrt((0.1 / 4) ** 2 + (0.2 / 4) ** 2 + (0.3 / 2) ** 2))


def test_one_question_has_no_standard_error_and_hides_none():
    lone = mean([1.0])
    assert lone.stderr is None
    assert micro([lone, mean([0.0, 1.0])]).stderr is None


DRAWS = ("1001", "1011001", "111", "100000010", "111100", "10110")  # answers of six subjects


def test_clustered_errors_are_those_of_statsmodels():
    """Of OLS on a constant, and of WLS for the macro average, with cov_type="cluster" and no correction (0.15)."""
    subjects = [mean([float(c) for c in draws]) for draws in DRAWS]
    assert micro(subjects).stderr_clustered == pytest.approx(0.09548543063354067, rel=1e-12)
    assert macro(subjects).value == pytest.approx(0.5933862433862435, rel=1e-12)
    assert macro(subjects).stderr_clustered == pytest.approx(0.0939435956214769, rel=1e-12)


def test_the_clustered_error_of_micro_is_millers_sum_over_clusters():
    xs = [np.array([float(c) for c in draws]) for draws in DRAWS]
    every = np.concatenate(xs)
    expected = np.sqrt(sum((x - every.mean()).sum() ** 2 for x in xs)) / len(every)
    assert micro([mean(x.tolist()) for x in xs]).stderr_clustered == pytest.approx(expected)


@pytest.mark.parametrize(
    ("right", "n", "expected"),  # of statsmodels 0.15, proportion_confint(method="wilson")
    [
        (0, 10, (0.0, 0.2775327999)),
        (3, 10, (0.1077912674, 0.6032218525)),
        (50, 57, (0.7675355156, 0.9392193984)),
        (57, 57, (0.9368611651, 1.0)),
        (5000, 14042, (0.3481950413, 0.3640329508)),
    ],
)
def test_the_interval_of_a_subject_is_wilsons(right, n, expected):
    assert mean([1.0] * right + [0.0] * (n - right)).interval == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("v", "expected"), [(4, 2.77645), (6, 2.44691), (9, 2.26216), (20, 2.08596), (56, 2.00324)])
def test_quantiles_are_scipys(v, expected):
    assert quantile(v + 1) == pytest.approx(expected, abs=1e-3)
    assert quantile(4) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(("k", "size", "average"), [(5, 25, micro), (9, 25, macro), (57, 25, micro), (15, 60, macro)])
def test_intervals_of_averages_hold_the_rate_that_subjects_were_drawn_around(k, size, average):
    """Subjects' rates scatter about 0.6 (beta): 95 % intervals hold it 93 to 99 times of 100."""
    rng = np.random.default_rng(3)
    held = 0
    for rates in rng.beta(12, 8, (600, k)):
        right = rng.binomial(size, rates) / size
        parts = [Mean(a, float(np.sqrt(a * (1 - a) / (size - 1))), size) for a in right.tolist()]
        low, high = average(parts).interval
        held += low <= 0.6 <= high
    assert 0.93 <= held / 600 <= 0.99


def test_few_subjects_are_taken_as_given():
    parts = [mean([float(c) for c in draws]) for draws in DRAWS[:3]]
    few, value = micro(parts), micro(parts).value
    assert few.stderr_clustered != pytest.approx(few.stderr)
    assert few.interval == pytest.approx(wilson(value, min(few.n, value * (1 - value) / few.stderr**2)))


def test_values_that_are_no_shares_have_no_interval():
    assert mean([3.0, 9.0]).interval is None
    assert mean([1.0, 1.0]).interval == wilson(1.0, 2)
