"""`llmkit export --via optimum`: models that no plugin describes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llmkit.cli.options import Writing
from llmkit.cli.output import Output, duration
from llmkit.cli.writing import interrupted_check, mark_failed

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint

# What this way takes of the options of `export`. `--no-resume` asks for what it does anyway.
HONOURED = frozenset(
    {"model", "to", "via", "output", "overwrite", "force", "dry_run", "no_resume", "no_check"}
    | {"json", "quiet", "verbose", "plugin"}
)
_TOLERANCE = 1e-4  # float32, as tracing leaves it


def export_via(out: Output, ckpt: Checkpoint, writing: Writing, via: str, *, check: bool) -> None:
    """Let another exporter write the folder, and compare it with transformers.

    Args:
        check: compare logits afterwards.

    Raises:
        InputError: no such exporter, or an option that it does not have.
    """
    from llmkit.errors import InputError
    from llmkit.onnx.via import VIA, compare_with_transformers, export_by_optimum
    from llmkit.pipeline.target import Target

    if via not in VIA:
        raise InputError(f"--via {via!r} is unknown; expected {', '.join(VIA)}", hint="--via optimum")
    path = f"--via {via}, which traces the model as transformers computes it"
    out.refuse_options(set(out.given) - HONOURED, path)
    if writing.dry_run:
        document = {"dry_run": True, "out": str(writing.output), "via": via, "peak_nbytes": 2 * ckpt.nbytes}
        out.answer(document, lambda: out.record({"plan": f"{writing.output}, by {via}: {ckpt.label} whole in memory"}))
        return
    started = time.monotonic()
    target = Target(writing.output, writing.overwrite, writing.force, writing.inputs)
    manifest = export_by_optimum(ckpt, target)
    elapsed = time.monotonic() - started
    try:
        differences = compare_with_transformers(ckpt, writing.output) if check else []
    except KeyboardInterrupt:
        raise interrupted_check(writing.output) from None
    files = {name: entry["nbytes"] for name, entry in manifest["files"].items()}
    document = {
        "out": str(writing.output),
        "nbytes": sum(files.values()),
        "files": files,
        "elapsed_s": round(elapsed, 3),
        "recipe": manifest["recipe"],
        "tolerance": _TOLERANCE,
        "parity": [{"case": d.case, "largest": d.largest, "same_choice": d.same_choice} for d in differences] or None,
    }

    def render() -> None:
        from llmkit.tensors.spec import format_bytes

        out.line(f"wrote {writing.output}: {format_bytes(sum(files.values()))}, by {via}, {duration(elapsed)}")
        if differences:
            numbers = ["largest difference", "allowed", "same next token"]
            rows = [(d.case, f"{d.largest:.1e}", f"{_TOLERANCE:.1e}", f"{d.same_choice:.1%}") for d in differences]
            out.line("logits for random tokens, beside transformers'; differences are shares of the largest logit:")
            out.table(["computed", *numbers], rows, right=numbers)
            if all(d.largest <= _TOLERANCE for d in differences):
                out.line("passed: the exported model computes what transformers does")
        out.hint(f"llmkit generate {writing.output} PROMPT")

    out.answer(document, render, brief=str(writing.output))
    worst = max(differences, key=lambda d: d.largest, default=None)
    if worst is not None and not worst.largest <= _TOLERANCE:
        mark_failed(writing.output, "those of transformers")
        out.refuse(f"the exported model differs from transformers: {worst.case} by {worst.largest:.1e}")
