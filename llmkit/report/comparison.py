"""Runs compared with the first one: a sentence, tests of significance, and differences with intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from llmkit.errors import InputError
from llmkit.evaluation.comparison import Comparison, Difference, Flips, compare
from llmkit.evaluation.paired import holm
from llmkit.evaluation.record import RunRecord
from llmkit.report.runs import Pairs, RunView
from llmkit.report.setting import number, percent, signed
from llmkit.report.svg import scale_of
from llmkit.report.table import Figures, PlotRow, PlotTable, percent_axis

_Parts = Mapping[int, tuple[Difference, Flips | None]]
_MINUS = re.compile(r"(?<= )-(?=\d)")


@dataclass(frozen=True, slots=True)
class Compared:
    """One run compared with the first."""

    sentence: str
    facts: Pairs


@dataclass(frozen=True, slots=True)
class ComparisonView:
    """The runs beside the first one, over one benchmark."""

    title: str
    runs: Sequence[RunView]
    compared: Sequence[Compared]
    table: PlotTable


def comparisons(records: Sequence[RunRecord], views: Sequence[RunView]) -> tuple[list[ComparisonView], list[str]]:
    """Each run beside the first one, over the questions that both have; and why a run is beside none.

    The p values are adjusted for all comparisons of the page.
    """
    done: list[tuple[int, Comparison]] = []
    reasons: list[str] = []
    for i, record in enumerate(records[1:], 1):
        try:
            labels = views[0].name, views[i].name
            done += [(i, c) for c in compare(records[0], [record], labels, common=True)]
        except InputError as error:
            reasons.append(f"not compared: {error.message}")
    adjusted = holm([c.p_value for _, c in done])
    done = [(i, replace(c, p_adjusted=p)) for (i, c), p in zip(done, adjusted, strict=True)]
    benches = dict.fromkeys(c.bench for _, c in done)
    return [_view({i: c for i, c in done if c.bench == bench}, views, records[0]) for bench in benches], reasons


def _view(by_run: dict[int, Comparison], views: Sequence[RunView], baseline: RunRecord) -> ComparisonView:
    first = next(iter(by_run.values()))
    bench = baseline.benches.get(first.bench)
    categories = {s.name: s.subject.category for s in bench.subjects} if bench is not None else {}
    lines = list(_lines(by_run, categories))
    bounds = [end for _, _, parts in lines for d, _ in parts.values() for end in (d.change.value, *d.interval)]
    scale = scale_of([*bounds, 0.0], low=-1.0, high=1.0)
    rows = [
        PlotRow.drawn(scale, label, [_figures(i, *p) for i, p in parts.items()], is_group=is_group, reference=0.0)
        for label, is_group, parts in lines
    ]
    words = (
        f"Points of accuracy gained or lost against {first.baseline} on the same questions, with 95 % intervals; "
        "left of the dashed line is worse. Arrows count answers that became wrong (↓) and right (↑)."
    )
    table = PlotTable(words, "subject", "change, points", percent_axis(scale, is_signed=True), rows, len(by_run) > 1)
    compared = [Compared(_MINUS.sub("−", c.sentence), _facts(c)) for c in by_run.values()]
    return ComparisonView(first.title, [views[i] for i in by_run], compared, table)


def _lines(by_run: Mapping[int, Comparison], category_of: Mapping[str, str]) -> Iterator[tuple[str, bool, _Parts]]:
    yield "all questions", True, {i: (c.micro, c.flips) for i, c in by_run.items()}
    names = {"macro": "mean of subjects", "categories": "mean of categories"}
    for average, label in names.items():
        means = {i: (c.averages[average], None) for i, c in by_run.items() if average in c.averages}
        if means and any(len(c.subjects) > 1 for c in by_run.values()):
            yield label, True, dict(means)
    subjects = list(dict.fromkeys(name for c in by_run.values() for name in c.subjects))
    for category in dict.fromkeys(category_of.get(subject, "") for subject in subjects):
        parts = {i: c.categories[category] for i, c in by_run.items() if category in c.categories}
        if parts:
            yield category, True, dict(parts)
        for subject in subjects:
            if category_of.get(subject, "") == category:
                parts = {i: c.subjects[subject] for i, c in by_run.items() if subject in c.subjects}
                yield subject.replace("_", " "), False, dict(parts)


def _figures(series: int, difference: Difference, flips: Flips | None) -> Figures:
    low, high = difference.interval
    arrows = f"{flips.to_wrong}↓ {flips.to_right}↑" if flips is not None else ""
    text = f"{signed(difference.change.value)} [{signed(low)}, {signed(high)}]"
    words = f"{signed(difference.change.value)} points, 95 % interval {signed(low)} to {signed(high)}"
    if flips is not None:
        words += f", {flips.to_wrong} answers became wrong, {flips.to_right} right"
    return Figures(series, difference.change.value, low, high, text, words, arrows)


def _facts(c: Comparison) -> Pairs:
    low, high = c.bootstrap
    before, after = percent(c.reported.before), percent(c.reported.after)
    shown = {
        "accuracy": f"{before} % → {after} %, {number(c.micro.change.n)} questions",
        "flipped": f"{c.flips.to_wrong} to wrong, {c.flips.to_right} to right, {c.flips.wrong_to_wrong} wrong to wrong",
        "McNemar, exact": f"p = {number(c.p_adjusted, 2)} (adjusted by Holm for all comparisons here)",
        "bootstrap": f"95 % interval {signed(low)} to {signed(high)} points",
        "divergence": f"{number(c.kl)} nats, mean over the choices' probabilities" if c.kl is not None else "",
        "left out": f"{number(c.n_left_out)} questions that only one run has" if c.n_left_out else "",
        "other prompts": f"{number(c.n_other_prompts)} of the questions" if c.n_other_prompts else "",
    }
    return [(name, value) for name, value in shown.items() if value]
