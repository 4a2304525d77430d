"""Thresholds of a CI job: an accuracy that must be reached, a drop that must not be exceeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmkit.errors import InputError, suggestion
from llmkit.evaluation.comparison import Comparison
from llmkit.evaluation.record import RunRecord

_T = TypeVar("_T")
_ROUNDING = 1e-12  # a drop of exactly the threshold is allowed
AVERAGES = ("micro", "macro", "categories")


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound on one average, or on the figure of every benchmark and task.

    Attributes:
        bench: a benchmark or task; empty for all.
        average: micro, macro (over subjects) or categories; empty for the one that the protocol's authors report.
        value: a share, 0 to 1.
    """

    bench: str
    average: str
    value: float


@dataclass(frozen=True, slots=True)
class Gate:
    """One threshold held against one figure.

    Attributes:
        name: what is bounded: `mmlu macro`.
        passed: whether the threshold is kept.
        message: the figure and the threshold.
    """

    bench: str
    name: str
    passed: bool
    message: str


def parse_thresholds(text: str, option: str) -> list[Threshold]:
    """`0.45`, or `mmlu=0.45,ceval:macro=0.4`.

    Raises:
        InputError: naming the part that is none.
    """
    thresholds = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, number = part.rpartition("=")
        bench, _, average = name.strip().partition(":")
        example = f"{option} 0.45, or {option} mmlu=0.45,ceval:macro=0.4"
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"{option} {part}: {number!r} is no number", hint=example) from None
        if not 0 <= value <= 1:
            raise InputError(f"{option} {part}: expected a share from 0 to 1", hint=example)
        if average and average not in AVERAGES:
            before = f"{option} {name.partition(':')[0].strip()}:"
            hint = suggestion(average, AVERAGES, f"{before}micro={number}", before)
            raise InputError(f"{option} {part}: no average {average!r}; expected {', '.join(AVERAGES)}", hint=hint)
        thresholds.append(Threshold(bench, average, value))
    if not thresholds:
        raise InputError(f"{option} {text!r} holds no threshold", hint=f"{option} 0.45")
    return thresholds


def check_names(thresholds: Sequence[Threshold], names: Sequence[str], option: str) -> None:
    """Refuse a threshold on a benchmark that is not among `names`.

    Raises:
        InputError: with the nearest name.
    """
    for threshold in thresholds:
        if threshold.bench and threshold.bench not in names:
            raise InputError(
                f"{option}: {threshold.bench} is not scored; scored are {', '.join(names) or 'none'}",
                hint=suggestion(threshold.bench, names, f"leave {threshold.bench} out of {option}"),
            )


def check_scores(record: RunRecord, thresholds: Sequence[Threshold], option: str) -> list[Gate]:
    """Each threshold against the scores of a run.

    Raises:
        InputError: there is no such benchmark or average.
    """
    scores: dict[str, dict[str, float]] = {name: {"micro": score} for name, score in record.scores.items()}
    usual = dict.fromkeys(scores, "micro") | {name: result.average for name, result in record.benches.items()}
    for name, result in record.benches.items():
        scores[name]["micro"] = result.micro.value
        scores[name]["macro"] = result.macro.value
        if result.macro_categories is not None:
            scores[name]["categories"] = result.macro_categories.value
    check_names(thresholds, list(scores), option)
    gates = []
    for threshold in thresholds:
        for bench in [threshold.bench] if threshold.bench else scores:
            average = threshold.average or usual[bench]
            value = _average(scores[bench], bench, average, option)
            passed = value >= threshold.value
            figure = f"{bench} {average}"
            message = f"{figure} {value:.4f} {'reaches' if passed else 'is below'} {threshold.value:g}"
            gates.append(Gate(bench, figure, passed, message))
    return gates


def check_drops(
    comparisons: Sequence[Comparison], thresholds: Sequence[Threshold], option: str, *, strict: bool = False
) -> list[Gate]:
    """Each threshold against the drops from the baseline.

    A drop fails that is larger than its threshold and significant (`Comparison.is_significant`).

    Args:
        strict: any larger drop fails.

    Raises:
        InputError: there is no such benchmark or average.
    """
    check_names(thresholds, list(dict.fromkeys(c.bench for c in comparisons)), option)
    gates = []
    for threshold in thresholds:
        for each in (c for c in comparisons if threshold.bench in ("", c.bench)):
            average = threshold.average or each.average
            change = _average(each.averages, each.bench, average, option).change.value
            is_large = -change > threshold.value + _ROUNDING
            is_sure = each.is_significant(average)
            figure = f"{each.bench} {average}: {each.label} against {each.baseline}"
            doubt = ", not significant" if is_large and not is_sure else ""
            message = f"{figure} {change:+.4f}{doubt}, allowed are {-threshold.value:+g}"
            gates.append(Gate(each.bench, figure, not is_large or not (is_sure or strict), message))
    return gates


def _average(averages: Mapping[str, _T], bench: str, average: str, option: str) -> _T:
    if average not in averages:
        raise InputError(
            f"{option}: {bench} has no average {average!r}; it has {', '.join(averages)}",
            hint=f"{option} {bench}:{next(iter(averages))}=…",
        )
    return averages[average]
