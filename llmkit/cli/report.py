"""`llmkit report`: what run records say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.output import Output
from llmkit.cli.scores import render_record

RunsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="RUN…", help="Records of llmkit eval -o; results files of lm-eval, or their folders."),
]


@command("llmkit report run.json", "llmkit report lm-eval-output/")
def report(out: Output, runs: RunsArgument) -> None:
    """Print the scores of run records again.

    Reads llmkit's records and lm-eval's results_*.json with the samples_*.jsonl beside them.
    """
    from llmkit.evaluation.records import read_record

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
