"""Averages and standard errors against numpy, lm-eval, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.evaluation.statistics import Mean, macro, macro_of_groups, mean, micro


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
