"""`llmkit export --via optimum`: models that no plugin describes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llmkit.cli.interrupts import interruptible
from llmkit.cli.options import WriteOptions
from llmkit.cli.output import Output, duration
from llmkit.cli.parity import refuse_difference, show_parity
from llmkit.cli.writing import interrupted_check
from llmkit.errors import require_choice
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint

# What this way takes of the options of `export`. `--no-resume` asks for what it does anyway.
HONOURED = frozenset(
    {"model", "to", "via", "output", "overwrite", "force", "dry_run", "no_resume", "no_check"}
    | {"json", "quiet", "verbose", "plugin"}
)
_TOLERANCE = 1e-4  # float32, as tracing leaves it


def export_via(out: Output, ckpt: Checkpoint, writing: WriteOptions, via: str, *, check: bool) -> None:
    """Let another exporter write the folder, and compare it with transformers.

    Args:
        check: compare logits afterwards.

    Raises:
        InputError: no such exporter, or an option that it does not have.
    """
    from llmkit.onnx.parity import ParityReport
    from llmkit.onnx.via import VIA, compare_with_transformers, export_by_optimum
    from llmkit.pipeline.target import Target

    require_choice("--via", via, VIA, "--via optimum")
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
    with interruptible(lambda: interrupted_check(writing.output)):
        checked = ParityReport(compare_with_transformers(ckpt, writing.output) if check else [], [], _TOLERANCE)
    files = {name: entry["nbytes"] for name, entry in manifest["files"].items()}
    document = {
        "out": str(writing.output),
        "nbytes": sum(files.values()),
        "files": files,
        "elapsed_s": round(elapsed, 3),
        "recipe": manifest["recipe"],
        **(checked.as_dict() if check else {"tolerance": _TOLERANCE, "parity": None}),
    }

    def render() -> None:
        out.line(f"wrote {writing.output}: {format_bytes(sum(files.values()))}, by {via}, {duration(elapsed)}")
        if check:
            show_parity(out, checked, "transformers")
        out.hint(f"llmkit generate {writing.output} PROMPT")

    out.answer(document, render, brief=str(writing.output))
    refuse_difference(out, writing.output, checked, "transformers")
