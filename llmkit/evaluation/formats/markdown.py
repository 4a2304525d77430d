"""A Markdown table for a model card: a row for each benchmark and category, a column for each run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from llmkit.errors import InputError
from llmkit.evaluation.formats.format import ReportFormat
from llmkit.evaluation.formats.hub import conditions
from llmkit.evaluation.record import RunRecord
from llmkit.evaluation.report_inputs import ReportInputs, run_names
from llmkit.evaluation.statistics import Mean
from llmkit.version import __version__

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    if not inputs.records:
        raise InputError("nothing to put in a table: no run record is given", hint="llmkit report run.json -o card.md")
    return {"": "\n".join(_lines(inputs)).encode("utf-8", "replace") + b"\n"}


def _lines(inputs: ReportInputs) -> Iterator[str]:
    records = inputs.records
    yield f"<!-- llmkit report {__version__} -->"
    yield ""
    yield _row(["", *map(_text, run_names([r.model for r in records]))])
    yield _row(["---", *["---:"] * len(records)])
    for name in dict.fromkeys(name for r in records for name in r.benches):
        title = " and ".join(dict.fromkeys(r.benches[name].title for r in records if name in r.benches))
        yield _row([f"**{_text(title)}**", *(_cell(getattr(r.benches.get(name), "reported", None)) for r in records)])
        yield from _groups(records, name)
    for task in dict.fromkeys(task for r in records for task in r.tasks):
        for key in dict.fromkeys(k for r in records for k, v in r.tasks.get(task, {}).items() if isinstance(v, float)):
            if "_stderr" not in key:
                values = [r.tasks.get(task, {}).get(key) for r in records]
                label = f"{task}, {key.removesuffix(',none')}"
                yield _row([_text(label), *(f"{v:.4f}" if isinstance(v, float) else "" for v in values)])
    yield ""
    notes = dict.fromkeys(f"{b.title}: {conditions(r, b)}" for r in records for b in r.benches.values())
    yield f"Percent of questions answered rightly, ± one standard error. {'; '.join(map(_text, notes))}."


def _groups(records: Sequence[RunRecord], name: str) -> Iterator[str]:
    present = [r.benches.get(name) for r in records]
    several = [b if b and len(b.subjects) > 1 else None for b in present]
    means: dict[str, list[Mean | None]] = {
        "over all questions": [b.micro if b and b.average == "macro" else None for b in several],
        "mean of subjects": [b.macro if b and b.average != "macro" else None for b in several],
    }
    for label in dict.fromkeys(k for b in present if b for k in b.subsets):
        means[f"{label} subset"] = [b.subsets[label][0] if b and label in b.subsets else None for b in present]
    for label in dict.fromkeys(k for b in present if b for k in b.categories):
        means[label] = [b.categories[label][0] if b and label in b.categories else None for b in present]
    for label, row in means.items():
        if any(row):
            yield _row([f"— {_text(label)}", *map(_cell, row)])


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{100 * mean.value:.1f}" + (f" ± {100 * mean.stderr:.1f}" if mean.stderr is not None else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """Text that Markdown obeys nothing in."""
    return _SPECIAL.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


FORMAT = ReportFormat("markdown", "a Markdown table", (".md", ".markdown"), _files, b"<!-- llmkit report")
