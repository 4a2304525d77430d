"""`llmkit quantize --evaluate`: both models over a text that calibration did not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.cli.output import Output
from llmkit.errors import InputError

if TYPE_CHECKING:
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.cli.grid_options import CalibrationOptions
    from llmkit.evaluation.divergence import Divergence

_LARGE_NBYTES = 2**31  # in float32


@dataclass(frozen=True)
class HeldOutText:
    """Windows of a text to measure on.

    Attributes:
        name: as `--evaluate` names it.
        rows: token ids, all windows of one length.
        device: where both models compute.
    """

    name: str
    rows: list[list[int]]
    device: str

    def measure(self, out: Output, before: Checkpoint, folder: Path) -> Divergence:
        """The float model and the quantized one over the same windows; large models one layer at a time."""
        from llmkit.checkpoint.checkpoint import open_checkpoint
        from llmkit.decoder.load import load_decoder
        from llmkit.evaluation.divergence import ModelDistributions, measure_divergence

        is_large = sum(4 * lazy.spec.numel for lazy in before.tensors.values()) > _LARGE_NBYTES
        floats, quantized = (
            load_decoder(ckpt, device=self.device, streamed=is_large) for ckpt in (before, open_checkpoint(folder))
        )
        ids = [i for row in self.rows for i in row]
        return measure_divergence(
            ModelDistributions(floats), quantized, ids, context=len(self.rows[0]), progress=out.progress()
        )


def held_out_text(
    ckpt: Checkpoint,
    evaluate: str,
    calibrating: CalibrationOptions,
    quantizer: CalibratedQuantizer | StoredQuantizer | None,
) -> HeldOutText:
    """The windows to measure on, before any work.

    Raises:
        InputError: no such text, or nothing of it is left.
    """
    from llmkit.calibration.held_out import held_out
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.samples import Samples
    from llmkit.calibration.texts import read_text

    if evaluate != "rest":
        samples = Samples(read_text(Path(evaluate)), length=calibrating.length)
    elif isinstance(quantizer, CalibratedQuantizer) and quantizer.samples.text is not None:
        samples = quantizer.samples
    else:
        raise InputError("--evaluate rest: there is no text that calibration reads", hint="--evaluate FILE")
    rows = held_out(ckpt, samples, quantizer.read_of(samples.text) if quantizer is not None else None)
    return HeldOutText(evaluate, rows, calibrating.where)


def divergence_words(divergence: Divergence) -> str:
    """The measured divergence in a line."""
    return (
        f"perplexity {divergence.before.perplexity:.3f} → {divergence.after.perplexity:.3f}, "
        f"divergence {divergence.kl:.4f} nats, "
        f"{divergence.flipped:.1%} of {divergence.after.n_scored} likeliest tokens are others"
    )
