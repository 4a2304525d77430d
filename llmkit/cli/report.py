"""`llmkit report`: what run records say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.output import Output
from llmkit.cli.scores import render_record
from llmkit.errors import InputError

if TYPE_CHECKING:
    from llmkit.evaluation.formats.format import ReportFormat

RunsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="RUN…", help="Records of llmkit eval -o; results files of lm-eval, or their folders."),
]


@command(
    "llmkit report run.json",
    "llmkit report lm-eval-output/",
    "llmkit report before.json after.json vicuna-7b-int4 -o report.html",
    "llmkit report run.json --format lm-eval -o results/",
)
def report(
    out: Output,
    runs: RunsArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write a report here: report.html is a page to look at."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.report_formats,
            help="The form of what is written (default: as the ending of FILE says).",
        ),
    ] = None,
) -> None:
    """Print the scores of run records again, or write them as a page or in the forms that other programs read.

    Reads llmkit's records and lm-eval's results_*.json with the samples_*.jsonl beside them. For a page also what
    perplexity --json and quantize --json printed, and folders that llmkit wrote.
    """
    from llmkit.evaluation.records import read_record

    if output is not None:
        from llmkit.evaluation.formats.format import format_for

        _write(out, runs, output, format_for(output, format))
        return
    if format is not None:
        raise InputError(f"--format {format} writes files, but no -o says where", hint="add -o FILE or -o FOLDER")

    records = [read_record(path) for path in runs]
    for path, record in zip(runs, records, strict=True):
        for warning in record.warnings:
            out.warning(f"{path}: {warning}")
    scores = [(name, score) for record in records for name, score in record.scores.items()]

    def render() -> None:
        for i, record in enumerate(records):
            out.line() if i else None
            render_record(out, record)

    document = records[0].to_json() if len(records) == 1 else {"runs": [r.to_json() for r in records]}
    out.answer(document, render, brief="\n".join(f"{name} {score:.4f}" for name, score in scores))


def _write(out: Output, runs: list[Path], output: Path, form: ReportFormat) -> None:
    from llmkit.evaluation.report_inputs import read_inputs

    form.check(output)
    written = form.write(read_inputs(runs), output)

    def render() -> None:
        for path in written:
            out.line(f"wrote {path}")

    out.answer({"format": form.name, "files": [str(path) for path in written]}, render, brief=str(output))
