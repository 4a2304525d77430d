"""`llmkit report`: what run records say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.comparisons import compared, outcome, render_comparisons
from llmkit.cli.gating import gates_of
from llmkit.cli.options import GateOptions
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
    "llmkit report vicuna-7b.mmlu.json vicuna-7b-int4.mmlu.json --max-drop 0.01",
    "llmkit report before.json after.json vicuna-7b-int4 -o report.html",
    "llmkit report run.json --format lm-eval -o results/",
    "llmkit report run.shard-*-of-3.json -o run.json",
)
def report(
    out: Output,
    runs: RunsArgument,
    gating: GateOptions,
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
    """Print the scores of a run again, compare runs with the first one, or write them in forms that others read.

    Reads llmkit's records and lm-eval's results_*.json with the samples_*.jsonl beside them. Of several runs the first
    is the baseline: shows the paired difference with its 95 % interval, flipped answers, McNemar's exact test and a
    bootstrap, by category; refuses runs that did not answer the same questions. With -o a page or another form is
    written; for a page also of what perplexity --json and quantize --json printed, and of folders that llmkit wrote.
    """
    from llmkit.evaluation.merging import merge_shards
    from llmkit.evaluation.records import read_record

    if output is not None:
        out.refuse_options([f.name for f in fields(GateOptions)], "report -o", "run it once more without -o")
        from llmkit.evaluation.formats.format import format_for

        _write(out, runs, output, format_for(output, format))
        return
    if format is not None:
        raise InputError(f"--format {format} writes files, but no -o says where", hint="add -o FILE or -o FOLDER")

    read = merge_shards([(str(path), read_record(path)) for path in runs])
    records, names = [record for _, record in read], [Path(name) for name, _ in read]
    gates = gates_of(out, gating, has_baseline=len(records) > 1, how="llmkit report BASELINE RUN")
    for path, record in read:
        for warning in [*record.warnings, *record.letter_warnings]:
            out.warning(f"{path}: {warning}")
    comparisons = compared(out, records, names, gating) if len(records) > 1 else []
    judged = records[1:] or records
    checked = gates.check(judged, comparisons)

    def render() -> None:
        if comparisons:
            render_comparisons(out, comparisons)
        else:
            render_record(out, records[0])

    document = outcome(comparisons, checked)
    if not comparisons:
        document = records[0].to_json() | document
    brief = [c.sentence for c in comparisons] or [f"{name} {x:.4f}" for name, x in records[0].scores.items()]
    out.answer(document, render, brief="\n".join(brief))
    gates.finish(out, judged, comparisons, checked)


def _write(out: Output, runs: list[Path], output: Path, form: ReportFormat) -> None:
    from llmkit.evaluation.report_inputs import read_inputs

    form.check(output)
    written = form.write(read_inputs(runs), output)

    def render() -> None:
        for path in written:
            out.line(f"wrote {path}")

    out.answer({"format": form.name, "files": [str(path) for path in written]}, render, brief=str(output))
