"""The error tree and its exit codes.

    LlmkitError            2  anything a user can cause; always has a one-line message, often a hint
    ├── InputError         2  a missing, unreadable, truncated or malformed input
    ├── SpecError          2  names, shapes or dtypes that do not fit together
    ├── RequirementError   2  a missing extra, a step that cannot follow another, a wrong base
    ├── PluginError        2  a plugin that cannot be loaded or that clashes with another
    └── OutputError        2  the output exists, the disk is full, the folder cannot be written

A message says what, where, found and expected, in that order; the hint is a command to run.
Only `llmkit.cli.app` turns an error into an exit code. Everything else that escapes is a bug (exit code 3).
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Iterable

_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc|bad allocation|"
    r"failed to allocate memory|failed to map segment|unable to allocate|memory allocation (of|failed)|"
    r"can't start new thread|cannot allocate write\+execute|std::length_error",
    re.IGNORECASE,
)

# Of difflib's ratio; one letter of three, or two of five, may be wrong.
_ALIKE, _ALIKE_SHORT, _SHORT = 0.65, 0.66, 4
_BEGINNING = 3  # letters of a name that stand for it
_SYNONYMS = {"gpu": "cuda", "hf": "transformers", "onnxruntime": "onnx"}


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


class PluginError(LlmkitError):
    """A plugin that cannot be loaded or that clashes with another."""


class OutputError(LlmkitError):
    """The output exists, or cannot be written."""


def listing(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c and 37 more`: at most `limit` names in their given order."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def in_a_line(error: BaseException) -> str:
    """What another library's error says, without its line breaks and at most 300 characters of it."""
    return " ".join(str(error).split())[:300]


def counted(n: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The known name most like `word`, or None when none is close.

    Close is a slip of the fingers or a beginning: another word that shares some letters is no help, and neither is one
    with another number (int4 is not int8). Case and leading dashes do not count.
    """
    wanted = word.lstrip("-").lower()
    folded = {name.lstrip("-").lower(): name for name in choices}
    folded = {name: spelt for name, spelt in folded.items() if not _is_other_number(name, wanted)}
    cutoff = _ALIKE_SHORT if len(wanted) <= _SHORT else _ALIKE
    if matches := difflib.get_close_matches(wanted, folded, n=1, cutoff=cutoff):
        return folded[matches[0]]
    begun = [name for name in folded if len(wanted) >= _BEGINNING and name.startswith(wanted)]
    return folded[min(begun, key=len)] if begun else None


def suggestion(word: str, choices: Iterable[str], otherwise: str, before: str = "") -> str:
    """A hint for a name that is none of the known ones: the nearest of them, else what to do `otherwise`.

    Args:
        before: the option that the name belongs to, with a space.
    """
    guess = nearest(word, choices)
    return f"did you mean {before}{guess}?" if guess else otherwise


def require_choice(option: str, value: str, choices: Collection[str], otherwise: str | None = None) -> None:
    """Refuse a value that an option does not have.

    Args:
        otherwise: the hint where none of the choices is near; None: the first choice.

    Raises:
        InputError: naming the choices, and the nearest of them.
    """
    if value not in choices:
        first = next(iter(choices))
        hint = suggestion(_SYNONYMS.get(value, value), choices, otherwise or f"{option} {first}, or leave it out")
        raise InputError(f"{option} {value!r} is unknown; expected {', '.join(choices)}", hint=hint)


def _is_other_number(a: str, b: str) -> bool:
    """Whether two words differ in their digits alone, which are not the same in another order."""
    digits = [sorted(filter(str.isdigit, word)) for word in (a, b)]
    letters = [[c for c in word if not c.isdigit()] for word in (a, b)]
    return letters[0] == letters[1] and all(digits) and digits[0] != digits[1]


def is_memory_error(error: BaseException) -> bool:
    """Whether memory was short, in the words of Python, the system, torch, ONNX Runtime or the dynamic loader."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, Exception) and bool(_NO_MEMORY.search(str(error)))
