"""What a calibrated model is measured on: windows of a text that calibration did not read."""

from __future__ import annotations

from dataclasses import replace

from llmkit.calibration.samples import Samples
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError

MOST_WINDOWS = 64


def held_out(ckpt: Checkpoint, samples: Samples, read: Samples | None) -> list[list[int]]:
    """Token ids of windows to measure on, at most `MOST_WINDOWS`, spread over the text; all of one length.

    Args:
        ckpt: has the tokenizer.
        samples: the text, and the length of windows; how many are asked for and the seed do not matter.
        read: what calibration reads, of this or another text; none of those windows is among these.

    Raises:
        InputError: calibration reads all of the text, or the model writes it.
    """
    suffix, context = ckpt.prompt_suffix(), ckpt.require_model().dims.context
    if samples.text is None:
        raise InputError("nothing is left of what the model itself writes to measure on", hint="--evaluate FILE")
    rows = replace(samples, n=2**40).rows(ckpt, suffix, context)
    known = set()
    if read is not None and read.text is not None:
        known = {tuple(row) for row in read.rows(ckpt, suffix, context)}
    unread = [row for row in rows if tuple(row) not in known]
    if not unread:
        raise InputError(
            f"calibration reads all {len(rows)} windows of {samples.label}, and none is left to measure on",
            hint=f"--samples {max(len(rows) * 3 // 4, 1)}, a longer text, or --evaluate FILE with another one",
        )
    step = max(len(unread) / MOST_WINDOWS, 1.0)
    return [unread[int(i * step)] for i in range(min(len(unread), MOST_WINDOWS))]
