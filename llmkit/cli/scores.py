"""The tables of an evaluation's scores: of a run that has just ended, and of a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.cli.output import Output, duration
from llmkit.evaluation.statistics import MIN_CLUSTERS, Mean

if TYPE_CHECKING:
    from llmkit.evaluation.record import BenchResult, RunRecord


def render_record(out: Output, record: RunRecord, output: Path | None = None) -> None:
    """Scores by category and subject.

    Args:
        output: where the record was written.
    """
    for result in record.benches.values():
        _render_bench(out, result)
    for name, metrics in record.tasks.items():
        out.table(
            [name, "value"],
            [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in metrics.items()],
            right=["value"],
        )
        out.line()
    about = [str(x) for x in (record.model.get("label"), record.model.get("dtype")) if x]
    out.line(", ".join([*about, duration(record.elapsed_s)]))
    if output is not None:
        out.line(f"wrote {output}")


def _render_bench(out: Output, result: BenchResult) -> None:
    rows: list[Sequence[object]] = []
    categories = result.bench.categories([s.name for s in result.subjects])
    listed = categories or {"": [s.name for s in result.subjects]}
    by_name = {s.name: s for s in result.subjects}
    is_macro = result.average == "macro"
    columns = ["questions", "macro", "±", "micro"] if is_macro else ["questions", "accuracy", "±", "macro"]

    def row(name: str, micro: Mean, macro: Mean) -> Sequence[object]:
        first, second = (macro, micro) if is_macro else (micro, macro)
        return name, first.n, _share(first), _error(first), _share(second)

    for category, names in listed.items():
        if category:
            rows.append(row(category, *result.categories[category]))
        rows += [
            ("  " * bool(category) + n, by_name[n].acc.n, _share(by_name[n].acc), _error(by_name[n].acc), "")
            for n in names
        ]
    rows += [row(f"{subset} (subset)", *means) for subset, means in result.subsets.items()]
    rows.append(row("all", result.micro, result.macro))
    out.table([f"{result.title}, {result.shots} shots", *columns], rows, right=columns)
    out.line()
    _render_averages(out, result)
    out.line()


def _render_averages(out: Output, result: BenchResult) -> None:
    averages = [("over questions (micro)", result.micro), ("over subjects (macro)", result.macro)]
    averages.sort(key=lambda named: result.average not in named[0])  # first the one that its authors report
    if result.macro_categories is not None:
        averages.append(("over categories", result.macro_categories))
    columns = ["mean", "accuracy", "±", "± by subject", "95 % interval"]
    rows = [(name, _share(m), _error(m), _clustered(m), _interval(m)) for name, m in averages]
    out.table(columns, rows, right=columns[1:])
    letters = result.letters
    if letters is not None:
        parts = [f"chance {letters.chance:.4f}", f"always {letters.majority_letter} {letters.majority:.4f}"]
        if letters.mass is not None:
            parts.append(f"probability on the letters {letters.mass:.4f}")
        if letters.n_unread:
            parts.append(f"{letters.n_unread} answers could not be read")
        out.line(", ".join(parts))


def _share(mean: Mean) -> str:
    return f"{mean.value:.4f}"


def _clustered(mean: Mean) -> str:
    """Empty for few subjects: then it says nothing, and the interval is not made of it either."""
    is_known = mean.stderr_clustered is not None and mean.n_clusters >= MIN_CLUSTERS
    return f"{mean.stderr_clustered:.4f}" if is_known else ""


def _interval(mean: Mean) -> str:
    return "" if mean.interval is None else "{:.4f} to {:.4f}".format(*mean.interval)


def _error(mean: Mean) -> str:
    return "" if mean.stderr is None else f"{mean.stderr:.4f}"
