"""`llmkit verify`: is a folder still what llmkit wrote?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.output import Output
from llmkit.errors import counted
from llmkit.tensors.spec import format_bytes


@command("llmkit verify vicuna-7b", "llmkit verify vicuna-7b -q && echo sound")
def verify(
    out: Output,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that llmkit wrote.")],
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads (default: one a core, at most 8).")
    ] = None,
) -> None:
    """Check a folder against its manifest: sizes, hashes, names, index, config and tokenizer.

    Reads every byte once. Exit code 1, naming what differs, when something does.
    """
    from llmkit.inspection.check import check_output

    verdict = check_output(folder, workers=workers, progress=out.progress())
    document = {"folder": str(folder), "ok": verdict.is_ok, **asdict(verdict)}

    def render() -> None:
        for problem in verdict.problems:
            out.line(f"differs: {problem}")
        for note in verdict.notes:
            out.line(f"note: {note}")
        if verdict.is_ok:
            tensors = f"{counted(verdict.n_tensors, 'tensor')} in " if verdict.n_tensors else ""
            files = counted(verdict.n_files, "file")
            out.line(f"{folder} is as it was written: {tensors}{files}, {format_bytes(verdict.nbytes)} hashed")

    out.answer(document, render, brief="ok" if verdict.is_ok else "\n".join(verdict.problems))
    if not verdict.is_ok:
        shared = any("(shared with " in problem for problem in verdict.problems)
        hint = "make it again from a source that is sound; --weights copy shares nothing" if shared else None
        out.refuse(f"{folder} is not as it was written: {counted(len(verdict.problems), 'difference')}", hint)
