"""The last step of `llmkit quantize`: the model is written, then its sizes, errors and divergence are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.held_out import HeldOutText, divergence_words
from llmkit.cli.options import WriteOptions
from llmkit.cli.output import Output, finite
from llmkit.cli.writing import Addition, write
from llmkit.errors import counted
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from llmkit.calibration.bit_allocation import BitAllocation
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.evaluation.divergence import Divergence
    from llmkit.quantization.quality import Meter, Sizes

_N_WORST = 5


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known of a quantized model once it is written; the sizes are known before.

    Attributes:
        meter: the errors of weights, where they are measured.
        quantizer: what has findings and notes of the run that read a text.
        chosen: bits of each matrix, where they were chosen for a size.
    """

    sizes: Sizes
    meter: Meter | None = None
    quantizer: CalibratedQuantizer | StoredQuantizer | None = None
    chosen: BitAllocation | None = None

    @property
    def size_words(self) -> str:
        """Sizes before and after, and bits for each weight."""
        s = self.sizes
        words = (
            f"{format_bytes(s.before_nbytes)} → {format_bytes(s.after_nbytes)} "
            f"({s.after_nbytes / s.before_nbytes:.0%}), {s.bits_per_weight:.2f} bits per weight"
        )
        return words if self.meter is None else f"{words}, {s.linear_bits_per_weight:.2f} in the quantized layers"

    def for_plan(self) -> dict[str, str]:
        """The lines of the plan."""
        return {"size": self.size_words} | ({"bits": self.chosen.words()} if self.chosen is not None else {})

    def for_manifest(self) -> dict[str, Any]:
        """Plain data: what the manifest keeps of the run."""
        by_key = self.quantizer.findings() if self.quantizer is not None else {}
        by_key |= {"allocation": self.chosen.as_dict()} if self.chosen is not None else {}
        if self.meter is not None:
            by_key |= {"errors": {m.name: m.relative_error for m in self.meter.measured()}}
        return by_key | {"sizes": self.sizes.as_dict()}

    def for_document(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        document: dict[str, Any] = {}
        if self.meter is not None:
            document = {
                "sizes": self.sizes.as_dict(),
                "relative_error": self.meter.overall() if self.meter.measured() else None,
                "worst": [{"name": m.name, "relative_error": m.relative_error} for m in self.meter.worst(_N_WORST)],
                "unmeasured": self.meter.unmeasured(),
            }
        return document | ({"allocation": self.chosen.as_dict()} if self.chosen is not None else {})

    def show(self, out: Output) -> None:
        """The same for people: the sizes, and the layers with the largest errors."""
        out.line(f"size {self.size_words}")
        if self.meter is None:
            return
        n_measured, n_unmeasured = len(self.meter.measured()), len(self.meter.unmeasured())
        if n_measured:
            out.line(f"relative error {self.meter.overall():.4f} over {counted(n_measured, 'layer')}; the largest:\n")
            rows = [(m.name, f"{m.relative_error:.4f}") for m in self.meter.worst(_N_WORST)]
            out.table(["tensor", "relative error"], rows, right=["relative error"])
        if n_unmeasured:
            out.line(f"error not measured: {counted(n_unmeasured, 'layer')} that the interrupted run had written")


def write_quantized(
    out: Output,
    before: Checkpoint,
    after: Checkpoint,
    writing: WriteOptions,
    held: HeldOutText | None,
    *,
    meter: Meter | None = None,
    quantizer: CalibratedQuantizer | StoredQuantizer | None = None,
    chosen: BitAllocation | None = None,
) -> None:
    """Write the quantized model, and print sizes and errors.

    Args:
        held: what to measure on afterwards.
        meter: as of `Findings`, like what follows.
    """
    from llmkit.quantization.quality import sizes

    found = Findings(sizes=sizes(before.tensors, after.tensors), meter=meter, quantizer=quantizer, chosen=chosen)

    def finish(_manifest: Mapping[str, Any]) -> Addition:
        for note in quantizer.notes() if quantizer is not None else ():
            out.note(note)
        document, measured = found.for_document(), None
        if held is not None:
            measured = held.measure(out, before, writing.output)
            document["evaluation"] = _kept(writing.output, held, measured)

        def render() -> None:
            found.show(out)
            if measured is not None:
                out.line(f"\n{divergence_words(measured)}")

        return document, render

    write(out, after, writing, details=found.for_plan(), finish=finish, findings=found.for_manifest)


def _kept(output: Path, held: HeldOutText, measured: Divergence) -> dict[str, Any]:
    """What was measured as plain data; a folder's manifest keeps it (a file of another layout has none)."""
    entry = {"text": held.name, **measured.as_dict()}
    if output.is_dir():
        from llmkit.pipeline.commit import add_findings

        add_findings(output, {"evaluation": finite(entry)})
    return entry
