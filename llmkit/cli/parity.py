"""The comparison of logits after an export: its table, and the refusal where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.cli.output import Output

if TYPE_CHECKING:
    from llmkit.onnx.parity import ParityReport


def show_parity(out: Output, checked: ParityReport, reference: str) -> None:
    """Print the differences from `reference` (`the torch decoder`, `transformers`), and what they mean."""
    numbers = ["largest difference", "allowed", "same next token"]
    allowed = f"{checked.tolerance:.1e}"
    shown = [*((d, allowed) for d in checked.differences), *((d, "-") for d in checked.measured)]
    rows = [(d.case, f"{d.largest:.1e}", most, f"{d.same_choice:.1%}") for d, most in shown]
    owner = f"{reference}'" if reference.endswith("s") else f"{reference}'s"
    out.line(f"logits for random tokens, beside {owner}; differences are shares of the largest logit:")
    out.table(["computed", *numbers], rows, right=numbers)
    if checked.basis:
        out.line(f"{allowed} is allowed: {checked.basis}")
    if checked.measured:
        out.line("-: what rounding at run time adds. Random tokens magnify it; `llmkit perplexity` says what it costs")
    if not checked.failed:
        out.line(f"passed: the exported model computes what {reference} does")


def refuse_difference(out: Output, folder: Path, checked: ParityReport, reference: str) -> None:
    """If logits differ by more than the tolerance, note it in the folder and exit with code 1."""
    from llmkit.pipeline.files import write_file

    if not checked.failed:
        return
    text = f"The logits of this model differ from those of {reference}.\n"
    write_file(folder / "PARITY_FAILED", text.encode(), "llmkit's mark", lambda head: head.startswith(b"The logits"))
    worst = max(checked.failed, key=lambda d: d.largest)
    out.refuse(f"the exported model differs from {reference}: {worst.case} by {worst.largest:.1e}")
