"""Accuracy by category and subject: one table of dots with intervals for each benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import counted
from llmkit.evaluation.record import BenchResult, shares_of
from llmkit.evaluation.statistics import Mean
from llmkit.report.runs import RunView
from llmkit.report.setting import interval_words, percent
from llmkit.report.svg import Scale, scale_of
from llmkit.report.table import Figures, PlotRow, PlotTable, percent_axis


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A benchmark's table, and the runs in it."""

    title: str
    runs: Sequence[RunView]
    table: PlotTable


@dataclass(frozen=True, slots=True)
class _Line:
    label: str
    note: str
    is_group: bool
    means: Mapping[int, Mean]  # by run


def accuracies(results: Sequence[Mapping[str, BenchResult]], views: Sequence[RunView]) -> list[Accuracy]:
    """A table for each benchmark of the records, over all that have it.

    Args:
        results: of each record, by benchmark; in the order of `views`.
    """
    names = list(dict.fromkeys(name for benches in results for name in benches))
    return [_accuracy({i: b[name] for i, b in enumerate(results) if name in b}, views) for name in names]


def task_accuracies(tasks: Sequence[Mapping[str, Any]], views: Sequence[RunView]) -> Accuracy | None:
    """A table of the accuracies of lm-eval's other tasks; None where there are none.

    Args:
        tasks: of each record, metrics by task; in the order of `views`.
    """
    found: dict[tuple[str, str, str], dict[int, Mean]] = {}
    for i, by_name in enumerate(tasks):
        for task, metrics in by_name.items():
            for (metric, rest), mean in shares_of(metrics).items():
                found.setdefault((task, metric, rest), {})[i] = _of_sample(mean)
    if not found:
        return None
    lines = [
        _Line(task, metric if rest in ("", "none") else f"{metric}, {rest}", False, means)
        for (task, metric, rest), means in found.items()
    ]
    runs = sorted({i for means in found.values() for i in means})
    words = "A dot is the share of right answers, the bar its 95 % interval, where lm-eval gives a standard error."
    return _drawn("Tasks of lm-eval", words, "task", lines, [views[i] for i in runs], None)


def _of_sample(mean: Mean) -> Mean:
    """The mean with the number of questions derived from its standard error, if that number is unknown (a group's)."""
    if mean.n or not mean.stderr:
        return mean
    return replace(mean, n=max(round(mean.value * (1 - mean.value) / mean.stderr**2), 1))


def _drawn(
    title: str, words: str, what: str, lines: Sequence[_Line], runs: Sequence[RunView], chance: float | None
) -> Accuracy:
    scale = _scale(lines, chance)
    rows = [
        PlotRow.drawn(
            scale, line.label, [_figures(i, m) for i, m in line.means.items()], note=line.note,
            is_group=line.is_group, reference=chance, n=max(m.n for m in line.means.values()),
        )
        for line in lines
    ]  # fmt: skip
    return Accuracy(title, runs, PlotTable(words, what, "accuracy, %", percent_axis(scale), rows, len(runs) > 1))


def _accuracy(results: Mapping[int, BenchResult], views: Sequence[RunView]) -> Accuracy:
    first = next(iter(results.values()))
    chance = first.letters.chance if first.letters is not None else None
    lines = list(_lines(results))
    words = "A dot is the share of right answers, the bar its 95 % interval"
    words += f", the dashed line chance ({percent(chance)} %)." if chance is not None else "."
    words += " Beside each name stand its questions; in the row of a category all of them count the same."
    what = "subject" if any(not line.is_group for line in lines) else "average"
    shots = sorted({r.shots for r in results.values()})
    titles = " and ".join(dict.fromkeys(r.title for r in results.values()))
    title = f"{titles}, {' and '.join(map(str, shots))} {'shot' if shots == [1] else 'shots'}"
    return _drawn(title, words, what, lines, [views[i] for i in results], chance)


def _scale(lines: Sequence[_Line], chance: float | None) -> Scale:
    means = [m for line in lines for m in line.means.values()]
    bounds = [end for m in means for end in (m.value, *(m.interval or ()))]
    return scale_of([*bounds, chance], low=0.0, high=1.0)


def _lines(results: Mapping[int, BenchResult]) -> Iterator[_Line]:
    yield _Line("all questions", "", True, {i: r.micro for i, r in results.items()})
    if any(len(r.subjects) > 1 for r in results.values()):
        yield _Line("mean of subjects", "", True, {i: r.macro for i, r in results.items()})
    overall = {i: m for i, r in results.items() if (m := r.macro_categories) is not None and len(r.categories) > 1}
    if overall:
        yield _Line("mean of categories", "", True, overall)
    for subset in dict.fromkeys(name for r in results.values() for name in r.subsets):
        yield _Line(
            subset, "subset", True, {i: r.subsets[subset][0] for i, r in results.items() if subset in r.subsets}
        )
    by_name = {i: {s.name: s for s in r.subjects} for i, r in results.items()}
    subjects = {s.name: s.subject for r in results.values() for s in r.subjects}
    for category in dict.fromkeys(s.category for s in subjects.values()):
        means = {i: r.categories[category][0] for i, r in results.items() if category in r.categories}
        if means:
            yield _Line(category, "", True, means)
        for name, subject in subjects.items():
            if subject.category == category:
                means = {i: of[name].acc for i, of in by_name.items() if name in of}
                yield _Line(name.replace("_", " "), subject.label, False, means)


def _figures(series: int, mean: Mean) -> Figures:
    low, high = mean.interval or (None, None)
    bounds = "" if low is None else f" [{percent(low, 0)}, {percent(high, 0)}]"
    words = f"{percent(mean.value)} % {interval_words(mean)}" + (f", {counted(mean.n, 'question')}" if mean.n else "")
    return Figures(series, mean.value, low, high, f"{percent(mean.value)}{bounds}", words)
