"""Runs against a baseline: what is matched, what is refused, and what is said of the difference."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from llmkit.errors import InputError
from llmkit.evaluation.benches import Bench, Subject
from llmkit.evaluation.comparison import compare
from llmkit.evaluation.gates import check_drops, check_scores, parse_thresholds
from llmkit.evaluation.record import BenchResult, Question, RunRecord, SubjectResult
from llmkit.evaluation.statistics import macro, macro_of_groups, mean, micro

CATEGORIES = {"algebra": "STEM", "physics": "STEM", "law": "humanities"}


def run(answers: dict[str, str], *, targets: dict[str, str] | None = None, shots: int = 5, **changes) -> RunRecord:
    """A record of one benchmark; the right answer to every question is A, unless `targets` say another."""
    subjects = []
    for name, choices in answers.items():
        right = (targets or {}).get(name, "A" * len(choices))
        questions = tuple(
            Question(str(i), choice.strip(), target, prompt=f"{name}{i}{shots}")
            for i, (choice, target) in enumerate(zip(choices, right, strict=True))
        )
        acc = mean([float(q.is_right) for q in questions])
        subjects.append(SubjectResult(Subject(name, CATEGORIES.get(name, "")), acc, questions))
    bench = Bench("b", "Bench", tuple(s.subject for s in subjects), {}, "b_{subject}", "", "", "", "", "", 5)
    result = BenchResult(bench, tuple(subjects), (), shots, 0, "1", "", 1.0, {})
    return replace(RunRecord({"label": "m"}, {}, {}, "", 1.0, {"b": result}, {}, {}), **changes)


BASE = run({"algebra": "AAAAAAAB", "physics": "AABB", "law": "AAABBB"})
OTHER = run({"algebra": "AAAABBAC", "physics": "AACA", "law": "ABAB A"})


def test_differences_and_flips_are_counted_by_hand():
    (c,) = compare(BASE, [OTHER], ["a", "b"])
    assert (c.reported.before, c.reported.after) == (12 / 18, 11 / 18)
    assert (c.flips.to_wrong, c.flips.to_right, c.flips.wrong_to_wrong) == (3, 2, 3)
    by_subject = {name: (d.change.value, f.to_wrong, f.to_right) for name, (d, f) in c.subjects.items()}
    assert by_subject == {"algebra": (-0.25, 2, 0), "physics": (0.25, 0, 1), "law": (0.0, 1, 1)}
    assert c.averages["macro"].change.value == pytest.approx(0.0)
    assert c.averages["categories"].change.value == pytest.approx(0.0)
    assert c.categories["STEM"][0].change.value == pytest.approx(-1 / 12)
    assert c.is_tied
    assert c.sentence.startswith("b is tied with a on Bench (-5.6 points, 95 % interval -")
    assert c.sentence.endswith("; 3 questions flipped to wrong, 2 to right")


def test_averages_of_the_difference_are_those_of_the_paired_scores():
    (c,) = compare(BASE, [OTHER], ["a", "b"])
    rows = {}
    for a, b in zip(BASE.benches["b"].subjects, OTHER.benches["b"].subjects, strict=True):
        rows[a.name] = mean([float(q.is_right) - p.is_right for p, q in zip(a.questions, b.questions, strict=True)])
    assert c.reported.change == micro(rows.values())
    assert c.averages["macro"].change == macro(rows.values())
    groups = {"STEM": [rows["algebra"], rows["physics"]], "humanities": [rows["law"]]}
    assert c.averages["categories"].change == macro_of_groups(groups)
    assert c.reported.after - c.reported.before == pytest.approx(c.reported.change.value)


def test_what_is_surely_worse_is_called_so():
    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(8)]
    before = {name: "".join(rng.choice([*"AB"], p=[0.9, 0.1], size=60)) for name in names}
    after = {name: "".join(rng.choice([*"AB"], p=[0.7, 0.3], size=60)) for name in names}
    (c,) = compare(run(before), [run(after)], ["a", "b"])
    assert c.is_significant()
    assert c.reported.is_clear
    points = round(-100 * c.reported.change.value, 1)
    assert c.sentence.startswith(f"b is worse than a by {points} points on Bench, 95 % interval -")
    assert c.bootstrap[0] < c.reported.change.value < c.bootstrap[1] < 0
    (back,) = compare(run(after), [run(before)], ["b", "a"])
    assert back.sentence.startswith(f"a is better than b by {points} points on Bench")
    assert back.micro.change.value == -c.reported.change.value


def test_a_loss_in_some_subjects_is_no_tie():
    """The interval for other subjects holds 0, but on these the loss is no chance."""
    before = {f"s{i}": "A" * 40 for i in range(6)}
    (c,) = compare(run(before), [run(before | {"s0": "B" * 40})], ["a", "b"])
    assert not c.reported.is_clear
    assert c.is_significant()
    assert not c.is_tied
    assert "b is worse than a by 16.7 points on Bench (McNemar's p " in c.sentence
    assert "in some subjects only; for others" in c.sentence


def test_the_average_that_a_protocols_authors_report_is_compared():
    def by_macro(record):
        return replace(record, benches={"b": replace(record.benches["b"], protocol="official", average="macro")})

    (c,) = compare(by_macro(BASE), [by_macro(OTHER)], ["a", "b"])
    assert c.reported is c.averages["macro"]
    assert c.sentence.startswith("b is tied with a on Bench official (+0.0 points, ")


def test_equal_answers_are_said_to_be():
    (c,) = compare(BASE, [BASE], ["a", "b"])
    assert c.sentence == "b answers all 18 questions of Bench as a does"
    assert (c.p_value, c.bootstrap, c.kl) == (1.0, (0.0, 0.0), None)
    assert c.reported.interval[0] < 0 < c.reported.interval[1]


def test_p_values_of_several_runs_are_adjusted():
    worse = run({"algebra": "BBBBBBBB", "physics": "BBBB", "law": "BBBBBB"})
    several = compare(BASE, [OTHER, worse, worse], ["a", "b", "c", "d"])
    assert [c.label for c in several] == ["b", "c", "d"]
    assert several[1].p_value == pytest.approx(2 / 2**12)
    assert several[1].p_adjusted == pytest.approx(3 * 2 / 2**12)
    assert several[0].p_adjusted == pytest.approx(1.0)


def test_the_divergence_is_over_questions_with_log_probabilities():
    def with_logprobs(record, rows):
        (first, *rest) = record.benches["b"].subjects
        questions = tuple(replace(q, logprobs=row) for q, row in zip(first.questions, rows, strict=True))
        return replace(
            record, benches={"b": replace(record.benches["b"], subjects=(replace(first, questions=questions), *rest))}
        )

    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    a = with_logprobs(BASE, [tuple(p)] * 4 + [None] * 4)
    b = with_logprobs(OTHER, [tuple(q)] * 8)
    (c,) = compare(a, [b], ["a", "b"])
    assert c.kl == pytest.approx(float((0.5 * (p - q)).sum()))
    json.dumps(c.to_json())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run({"algebra": "AAAA", "physics": "AABB"}), r"8 in both, 10 only in a \(algebra 4, law 6\)"),
        (
            run({"algebra": "AAAAAAAB", "physics": "AABB", "law": "AAABBB", "logic": "A"}),
            r"18 in both, 1 only in b \(logic 1\)",
        ),
        (run({"algebra": "AAAAAAAB", "physics": "AABB", "law": "AAABBB"}, shots=0), "shots 5 in a, 0 in b"),
        (
            run({"algebra": "AAAAAAAB", "physics": "AABB", "law": "AAABBB"}, targets={"physics": "ADDA"}),
            r"2 questions of b \(of 18\) have another right answer in b than in a",
        ),
        (replace(BASE, benches={"b": replace(BASE.benches["b"], protocol="y")}), "protocol lm-eval in a, y in b"),
    ],
)
def test_other_questions_are_refused_with_numbers_or_left_out(other, message):
    with pytest.raises(InputError, match=message) as caught:
        compare(BASE, [other], ["a", "b"])
    assert caught.value.hint.endswith("--common")
    (c,) = compare(BASE, [other], ["a", "b"], common=True)
    n = [sum(len(s.questions) for s in record.benches["b"].subjects) for record in (BASE, other)]
    assert c.n_left_out == sum(n) - 2 * c.reported.change.n


def test_other_prompts_are_counted():
    other = run({"algebra": "AAAAAAAB", "physics": "AABB", "law": "AAABBB"}, shots=0)
    (c,) = compare(BASE, [other], ["a", "b"], common=True)
    assert (c.n_other_prompts, c.n_left_out) == (18, 0)


def test_runs_without_questions_or_benchmarks_in_common_are_refused():
    alone = run({"algebra": "A"})
    alone = replace(
        alone, benches={"b": replace(alone.benches["b"], subjects=(SubjectResult(Subject("x"), mean([1.0])),))}
    )
    for common in (False, True):
        with pytest.raises(InputError, match="b has no answers to the questions of b"):
            compare(BASE, [alone], ["a", "b"], common=common)
        with pytest.raises(InputError, match="no benchmark in common: b and c"):
            compare(BASE, [replace(BASE, benches={"c": BASE.benches["b"]})], ["a", "b"], common=common)
        with pytest.raises(InputError, match="no question of b in common"):
            compare(BASE, [run({"logic": "A"})], ["a", "b"], common=True)
    two = replace(BASE, benches={"b": BASE.benches["b"], "c": BASE.benches["b"]})
    with pytest.raises(InputError, match="only b has c; both have b"):
        compare(BASE, [two], ["a", "b"])
    assert [c.bench for c in compare(BASE, [two], ["a", "b"], common=True)] == ["b"]


def task_run(*answers: tuple[float, object]) -> RunRecord:
    samples = [{"doc_id": i, "acc": score, "responses": r, "target": 0} for i, (score, r) in enumerate(answers)]
    metrics = {"acc,none": sum(s for s, _ in answers) / len(answers), "version": "1", "shots": 0}
    return RunRecord({"label": "m"}, {}, {}, "", 1.0, {}, {"arc": metrics}, {}, {"arc": samples})


def test_lm_evals_other_tasks_are_compared_by_their_samples():
    yes, no, other = [[-1.0, True], [-2.0, False]], [[-3.0, False], [-1.0, True]], [[-9.0, True], [-8.0, False]]
    a = task_run((1.0, yes), (1.0, yes), (0.0, no), (0.0, ["text"]))
    b = task_run((1.0, yes), (0.0, no), (0.0, other), (0.0, ["another"]))
    (c,) = compare(a, [b], ["a", "b"])
    assert (c.reported.before, c.reported.after) == (0.5, 0.25)
    assert (c.flips.to_wrong, c.flips.to_right, c.flips.wrong_to_wrong) == (1, 0, 1)
    assert c.kl > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no threshold"),
        ("x", "'x' is no number"),
        ("mmlu=", "'' is no number"),
        ("45", "a share from 0 to 1"),
        ("mmlu=nan", "a share from 0 to 1"),
        ("mmlu:marco=0.4", "no average 'marco'"),
    ],
)
def test_thresholds_that_are_none_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_thresholds(text, "--fail-under")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("mmlu:marco=0.4", "did you mean --fail-under mmlu:macro?"),
        ("mmlu:nosuch=0.4", "--fail-under mmlu:micro=0.4"),
    ],
)
def test_the_hint_for_an_unknown_average_is_one_that_is_taken(text, hint):
    with pytest.raises(InputError) as caught:
        parse_thresholds(text, "--fail-under")
    assert caught.value.hint == hint


def test_thresholds_bound_scores_and_their_averages():
    def failed(text):
        return [
            g.name for g in check_scores(BASE, parse_thresholds(text, "--fail-under"), "--fail-under") if not g.passed
        ]

    assert failed("0.6666") == []
    assert failed("0.667") == ["b micro"]
    assert failed("b=0.6,b:macro=0.7,b:categories=0.5") == ["b macro"]
    with pytest.raises(InputError, match="c is not scored"):
        failed("c=0.1")
    with pytest.raises(InputError, match="b has no average 'categories'"):
        check_scores(run({"x": "A"}), parse_thresholds("b:categories=0.1", "--fail-under"), "--fail-under")


def test_a_drop_fails_when_it_is_large_and_no_chance():
    before = {f"s{i}": "A" * 30 for i in range(6)}
    fine, chance = (run(before | {"s0": "B" * n + "A" * (30 - n)}) for n in (1, 4))
    sure = run(dict.fromkeys(before, "B" * 5 + "A" * 25))

    def failed(other, text, **options):
        comparisons = compare(run(before), [other], ["a", "b"])
        gates = check_drops(comparisons, parse_thresholds(text, "--max-drop"), "--max-drop", **options)
        return [g.message for g in gates if not g.passed]

    assert failed(fine, "0.01") == failed(chance, "0.01") == []
    assert failed(chance, "0.01", strict=True) == ["b micro: b against a -0.0222, not significant, allowed are -0.01"]
    assert failed(chance, f"{4 / 180}", strict=True) == []
    assert failed(sure, "0.01") == ["b micro: b against a -0.1667, allowed are -0.01"]
    assert failed(sure, "b=0.2,b:macro=0.1") == ["b macro: b against a -0.1667, allowed are -0.1"]
    assert failed(run(before), "0", strict=True) == []
