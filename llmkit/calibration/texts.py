"""The text that a model is calibrated on, and the windows of tokens that are cut from it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats import text_file

__all__ = ["CalibrationText", "own_text", "read_text", "token_ids", "windows"]

_OWN = "own_text.txt"
_LEAST_CHARACTERS = 500
_HINT = "give a text of some pages"


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to calibrate on.

    Attributes:
        label: how notes call it.
        content: the text.
    """

    label: str
    content: str

    @property
    def digest(self) -> str:
        """Tells texts apart in a plan, and is recorded: SHA-256 of the text."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def own_text() -> CalibrationText:
    """The text that llmkit brings: prose, a conversation, code, JSON and tables, in eleven languages."""
    content = resources.files("llmkit.calibration").joinpath(_OWN).read_text(encoding="utf-8")
    return CalibrationText("llmkit's own text", content)


def read_text(path: Path) -> CalibrationText:
    """The text of a file.

    Raises:
        InputError: there is no such file, it is no text, or too short to tell anything from.
    """
    content = text_file.read_text(path, hint=_HINT)
    if len(content.strip()) < _LEAST_CHARACTERS:
        raise InputError(
            f"{path} has {len(content.strip())} characters, too few to calibrate on; at least {_LEAST_CHARACTERS}",
            hint=_HINT,
        )
    return CalibrationText(path.name, content)


def token_ids(text: CalibrationText, tokenizer: Any) -> list[int]:
    """All tokens of a text."""
    return list(tokenizer(text.content, verbose=False)["input_ids"])


def windows(
    ids: Sequence[int], length: int, *, samples: int | None = None, seed: int = 0, suffix: Sequence[int] = ()
) -> list[list[int]]:
    """Windows of `length` tokens that do not overlap, in the order of the text; what is over at its end is left out.

    Args:
        ids: tokens of the whole text.
        length: of a window, what every prompt ends with included; a shorter text is one window.
        samples: so many of them, chosen at random; None for all.
        suffix: ids that every prompt ends with.
    """
    ids = [i for i in ids if i not in suffix]
    length = min(length - len(suffix), len(ids))
    starts: Sequence[int] = range(0, len(ids) - length + 1, length)
    if samples is not None and samples < len(starts):
        starts = sorted(random.Random(seed).sample(starts, samples))
    return [[*ids[start : start + length], *suffix] for start in starts]
