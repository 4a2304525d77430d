"""The page: one HTML file without scripts and without network, for a phone, a desktop and paper, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup

from llmkit.errors import listing
from llmkit.evaluation.formats.format import ReportFormat
from llmkit.evaluation.report_inputs import ReportInputs
from llmkit.report.accuracy import Accuracy, accuracies, task_accuracies
from llmkit.report.comparison import ComparisonView, comparisons
from llmkit.report.flips import Flips, flips
from llmkit.report.layer_errors import ErrorMap, error_map
from llmkit.report.runs import RunView, run_views
from llmkit.report.setting import isolated, number, plain
from llmkit.report.steps import stages, step_table
from llmkit.report.table import Table
from llmkit.version import __version__


@dataclass(frozen=True, slots=True)
class Page:
    """What the template is given."""

    title: str
    subtitle: str
    runs: Sequence[RunView]
    warnings: Sequence[tuple[str, str]]
    accuracies: Sequence[Accuracy]
    comparisons: Sequence[ComparisonView]
    steps: Table | None
    errors: Sequence[ErrorMap]
    flips: Sequence[Flips]

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Id and title of each section there is."""
        optional = {
            ("accuracy", "Accuracy"): self.accuracies,
            ("comparison", "Comparison"): self.comparisons,
            ("steps", "Steps"): self.steps,
            ("errors", "Layer errors"): self.errors,
            ("questions", "Changed answers"): self.flips,
        }
        present = [section for section, content in optional.items() if content]
        return [("summary", "Summary"), *present, ("details", "How it was measured")]


def make_page(inputs: ReportInputs) -> Page:
    """Arrange what the inputs hold."""
    views = run_views(inputs)
    names = [view.name for view in views]
    found = stages(inputs)
    compared, reasons = comparisons(inputs.records, views)
    maps = [error_map(c.label, c.errors) for c in inputs.checkpoints if c.errors]
    titles = list(dict.fromkeys(names)) or [s.label for s in found]
    return Page(
        title=listing(titles, 3),
        subtitle=_subtitle(inputs),
        runs=views,
        warnings=[*_warnings(views), *((reason, "") for reason in reasons)],
        accuracies=_accuracies(inputs, views),
        comparisons=compared,
        steps=step_table(found) if len(found) > 1 or inputs.checkpoints else None,
        errors=[m for m in maps if m is not None],
        flips=_flips(inputs, names),
    )


def _accuracies(inputs: ReportInputs, views: Sequence[RunView]) -> list[Accuracy]:
    of_tasks = task_accuracies([r.tasks for r in inputs.records], views)
    return accuracies([r.benches for r in inputs.records], views) + ([of_tasks] if of_tasks is not None else [])


def _subtitle(inputs: ReportInputs) -> str:
    dates = sorted(r.created[:10] for r in inputs.records)
    benches = dict.fromkeys(b.bench.title for r in inputs.records for b in r.benches.values())
    parts = [", ".join([*benches, *dict.fromkeys(t for r in inputs.records for t in r.tasks)])]
    parts += ["perplexity"] if inputs.texts else []
    parts += ["measured " + " to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    return ", ".join(p for p in parts if p)


def _warnings(views: Sequence[RunView]) -> list[tuple[str, str]]:
    """Each warning once, with the runs it is of where it is not of all."""
    said_of: dict[str, list[str]] = {}
    for view in views:
        for warning in view.warnings:
            said_of.setdefault(warning, []).append(view.name)
    return [(w, "" if len(names) == len(views) else listing(names)) for w, names in said_of.items()]


def _flips(inputs: ReportInputs, names: Sequence[str]) -> list[Flips]:
    """Of each run and the first one."""
    shown = []
    for i, record in enumerate(inputs.records[1:], 1):
        first = inputs.records[0]
        for bench in record.benches:
            if bench in first.benches:
                shown.append(flips(bench, (first, record), (names[0], names[i])))
    return [f for f in shown if f is not None]


def render(inputs: ReportInputs) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llmkit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"isolated": isolated, "plain": plain, "number": number}
    style = (files("llmkit.report") / "templates" / "page.css").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        page=make_page(inputs), version=__version__, style=Markup(style)
    )
    return plain(page)  # text from outside stands in titles and attributes, too


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    return {"": render(inputs).encode()}


FORMAT = ReportFormat("html", "a page to look at", (".html", ".htm"), _files, b'content="llmkit report')
