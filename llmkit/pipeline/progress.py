"""What long work reports; the command line draws it, a script may ignore it."""

from __future__ import annotations

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
