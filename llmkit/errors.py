"""The error tree and its exit codes.

    LlmkitError            2  anything a user can cause; always has a one-line message, often a hint
    ├── InputError         2  a missing, unreadable, truncated or malformed input
    ├── SpecError          2  names, shapes or dtypes that do not fit together
    ├── RequirementError   2  a missing extra, a step that cannot follow another, a wrong base
    ├── RecipeError        2  a recipe file that cannot be read or run
    ├── PluginError        2  a plugin that cannot be loaded or that clashes with another
    ├── OutputError        2  the output exists, the disk is full, the folder cannot be written
    └── VerificationError  1  it ran, and the answer is no

A message says what, where, found and expected, in that order; the hint is a command to run.
Only `llmkit.cli.app` turns an error into an exit code. Everything else that escapes is a bug (exit code 3).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "InputError",
    "LlmkitError",
    "OutputError",
    "PluginError",
    "RecipeError",
    "RequirementError",
    "SpecError",
    "VerificationError",
    "listing",
    "nearest",
]


class LlmkitError(Exception):
    """An error that a user can cause and can mend."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The stable name of the class of error, as `--json` prints it (`input`, `spec`, …)."""
        return type(self).__name__.removesuffix("Error").lower()


class InputError(LlmkitError):
    """A missing, unreadable, truncated or malformed input."""


class SpecError(LlmkitError):
    """Names, shapes or dtypes that do not fit together."""


class RequirementError(LlmkitError):
    """Something needed is not there: an extra, a float weight, the right base."""


class RecipeError(LlmkitError):
    """A recipe that cannot be read or run."""


class PluginError(LlmkitError):
    """A plugin that cannot be loaded or that clashes with another."""


class OutputError(LlmkitError):
    """The output exists, or cannot be written."""


class VerificationError(LlmkitError):
    """It ran, and the answer is no."""

    exit_code = 1


def listing(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c and 37 more`: at most `limit` names in their given order."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like `word`, or None when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
