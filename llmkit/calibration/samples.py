"""The windows of a text that a model is calibrated on: which they are, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.calibration.self_generated import generated_by
from llmkit.calibration.texts import CalibrationText, token_ids, windows
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.errors import InputError
from llmkit.quantization.method import N_WINDOWS
from llmkit.tokenization.chat import prompt_of


@dataclass(frozen=True, slots=True)
class Samples:
    """The windows of a text that a model is calibrated on.

    Attributes:
        text: None for what the model itself writes.
        n: how many; all there are, where the text is shorter.
        length: of each, in tokens.
        seed: of the choice among all windows of the text, or of what the model writes.
    """

    text: CalibrationText | None
    n: int = N_WINDOWS
    length: int = 512
    seed: int = 0

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the plan, the history and `explain`."""
        text = {"sha256": self.text.digest} if self.text is not None else {}
        return {"calibration": self.label, **text, "samples": self.n, "length": self.length, "seed": self.seed}

    @property
    def label(self) -> str:
        """How notes call the text."""
        return self.text.label if self.text is not None else "what the model itself writes"

    def words(self) -> str:
        """The text and its windows, for the plan."""
        return f"calibrated on {self.label}: {self.n} windows of {self.length} tokens"

    def shortfall(self, n: int | None) -> list[str]:
        """A note that there were only `n` windows; empty if there were enough, or it is not known yet."""
        return [f"{self.label} gave {n} windows, {self.n} were asked for"] if n is not None and n < self.n else []

    def rows(self, tokenized: Checkpoint, suffix: Sequence[int], context: int | None) -> list[list[int]]:
        """Token ids, all rows of one length.

        Raises:
            InputError: the text has fewer tokens than one sample.
            Stopped: the run was stopped while the model wrote the text.
        """
        length = min(self.length, context or self.length)
        if self.text is None:
            return generated_by(tokenized, self.n, length, seed=self.seed, suffix=suffix)
        tokenizer = load_tokenizer(tokenized)
        prompt = prompt_of(tokenized, tokenizer) if self.text.has_conversations else None
        ids = token_ids(self.text, tokenizer, prompt)
        if len(ids) + len(suffix) < length:
            raise InputError(
                f"{self.text.label} has {len(ids)} tokens, fewer than one sample of {length}",
                hint=f"give a longer text, or --length {max(len(ids) // 2, 1)}",
            )
        return windows(ids, length, samples=self.n, seed=self.seed, suffix=suffix)
