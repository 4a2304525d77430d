"""Rows under a header, aligned; in a window names are folded, and numbers never are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest
from unicodedata import combining, east_asian_width

_GAP = "  "
_LEAST = 16  # a name is not folded to less, even where the window is smaller
_WORDS = re.compile(r"\S+\s*")
_PARTS = re.compile(r"[^./_-]*[./_-]?\s*")


def aligned(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str], window: int | None = None
) -> Iterator[str]:
    """The lines of a table.

    Args:
        right: the columns of numbers, which stand at the right.
        window: how many characters are beside each other; None: each row is one line, whatever its length.
    """
    widths = [max(map(_width, column)) for column in zip(columns, *rows, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - (window if window is not None else 1 << 40)
    if excess > 0:  # words of headers one below the other first
        for i, column in enumerate(columns):
            if column in right:
                words = max(map(_width, column.split()), default=0)
                least = max([words, *(_width(row[i]) for row in rows)])
                excess -= widths[i] - least
                widths[i] = least
    names = [i for i, column in enumerate(columns) if column not in right and widths[i] > _LEAST]
    while excess > 0 and (names := [i for i in names if widths[i] > _LEAST]):
        widths[max(names, key=widths.__getitem__)] -= 1
        excess -= 1
    for row in [columns, ["─" * width for width in widths], *rows]:
        folded = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*folded, fillvalue=""):
            cells = [
                _pad(cell, width, is_right=column in right)
                for cell, width, column in zip(line, widths, columns, strict=True)
            ]
            yield _GAP.join(cells).rstrip()


def _width(text: str) -> int:
    """How many places of a terminal a text takes: ideographs take two."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _pad(cell: str, width: int, *, is_right: bool) -> str:
    spaces = " " * (width - _width(cell))
    return spaces + cell if is_right else cell + spaces


def _fold(cell: str, width: int) -> list[str]:
    """A cell in lines, cut between words, else between the parts of a name; each begins as far in as the first."""
    indent = cell[: len(cell) - len(cell.lstrip())]
    lines = [indent]
    for word in _WORDS.findall(cell):
        for part in _PARTS.findall(word) if _width(indent + word.rstrip()) > width else [word]:
            if lines[-1] != indent and _width(lines[-1] + part.rstrip()) > width:
                lines.append(indent)
            for character in part:
                if _width((lines[-1] + character).rstrip()) > width:
                    lines.append(indent)
                lines[-1] += character
    return [line.rstrip() for line in lines]
