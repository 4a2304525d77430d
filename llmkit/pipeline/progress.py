"""What long work reports; the command line draws it, a script may ignore it."""

from __future__ import annotations

from math import isfinite
from typing import Protocol


class Progress(Protocol):
    """Receives progress. Calls may come from several threads."""

    def begin(self, total: int, label: str, unit: str = "B") -> None:
        """Work of `total` units begins; `unit` is `B` for bytes, or a noun."""

    def advance(self, n: int, note: str = "") -> None:
        """`n` more units are done; `note` names what is being worked on."""

    def end(self) -> None:
        """The work is over, done or not."""


class _Silent:
    def begin(self, total: int, label: str, unit: str = "B") -> None:
        pass

    def advance(self, n: int, note: str = "") -> None:
        pass

    def end(self) -> None:
        pass


NO_PROGRESS: Progress = _Silent()


def time_left(seconds: float, done: float, left: float) -> str:
    """`, 3 min 20 s left`, if what is left goes on as what is done did in so many seconds; empty before any is done.

    Args:
        done, left: in one unit.
    """
    return f", {duration(seconds * left / done)} left" if done else ""


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if not isfinite(seconds):
        return "an unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
