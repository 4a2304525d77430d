"""What the letters tell beside the accuracy, counted by hand."""

from __future__ import annotations

import math

import pytest

from llmkit.evaluation.letters import letters_of
from llmkit.evaluation.record import Question

FOUR, TEN = (-1.0, -2.0, -3.0, -4.0), tuple(-float(i) for i in range(1, 11))


def test_chance_counts_the_choices_of_each_question():
    questions = [Question("0", "A", "A", FOUR), Question("1", "B", "A", FOUR), Question("2", "J", "J", TEN)]
    letters = letters_of(questions)
    assert letters.chance == pytest.approx((0.25 + 0.25 + 0.1) / 3)
    assert (letters.majority_letter, letters.majority) == ("A", pytest.approx(2 / 3))
    assert (letters.mass, letters.n_unread) == (None, 0)


def test_without_log_probabilities_the_right_letters_are_the_choices():
    questions = [Question(str(i), "", "CADB"[i % 4]) for i in range(8)]
    letters = letters_of(questions)
    assert letters.chance == 0.25
    assert (letters.majority_letter, letters.majority) == ("A", 0.25)  # the first of equals
    assert letters.n_unread == 8
    assert letters_of([Question("0", "", "B"), Question("1", "A", "D")]).chance == 0.25


def test_little_probability_on_the_letters_is_said():
    low = letters_of(
        [Question("0", "A", "A", FOUR, 0.01), Question("1", "A", "B", FOUR, 0.03), Question("2", "A", "A")]
    )
    assert low.mass == pytest.approx(0.02)
    (warning,) = low.warnings("MMLU")
    assert warning.startswith("MMLU: the letters have 2.0% of the probability")
    assert letters_of([Question("0", "A", "A", FOUR, math.fsum(map(math.exp, FOUR)))]).warnings("MMLU") == []


def test_averages_alone_have_no_letters():
    assert letters_of([]) is None
