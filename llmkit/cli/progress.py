"""Two ways to show progress: a bar in a terminal, and a line each 10 % or 30 s elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.cli.terminal import clean, raw_stderr
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bar", "Lines"]

_LINE_EVERY_S = 30.0
_LINE_EVERY_SHARE = 0.1
_WIDE = 110  # columns; narrower terminals get a shorter bar, and one line all the same
_NUMBERS_WIDTH = 40  # "1000.0/1000.0 MB", "1000.0 MB/s", "0:00:00" and the spaces around them


class Bar:
    """A bar with the amount done, the rate, the time left and what is being worked on."""

    def __init__(self) -> None:
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        self._guard = threading.Lock()
        self._room = 0

    def begin(self, total: int, label: str, unit: str = "B") -> None:
        """Start a bar of `total` units."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self.end()
        amount: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), TextColumn(unit)]
        )
        console = Console(file=raw_stderr(), highlight=False)
        bar_width = 28 if console.width >= _WIDE else 12
        self._room = max(0, min(40, console.width - len(label) - bar_width - _NUMBERS_WIDTH))
        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=bar_width),
            *amount,
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._rich.add_task(clean(label, is_line=True), total=total, note="")
        self._rich.start()

    def advance(self, n: int, note: str = "") -> None:
        """Move the bar by `n` units."""
        with self._guard:
            if self._rich is not None and self._task is not None:
                self._rich.update(
                    self._task, advance=n, note=clean(note[-self._room :] if self._room else "", is_line=True)
                )

    def end(self) -> None:
        """Remove the bar."""
        with self._guard:
            if self._rich is not None:
                self._rich.stop()
            self._rich = None


class Lines:
    """A line each tenth of the work, or each half minute, whichever comes first."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._guard = threading.Lock()
        self._total = 0
        self._done = 0
        self._said = 0
        self._label = self._unit = ""
        self._started: float | None = None
        self._last: float | None = None

    def begin(self, total: int, label: str, unit: str = "B") -> None:
        """Start to count to `total` units."""
        with self._guard:
            self._total, self._label, self._unit = total, label, unit
            self._done = self._said = 0
            self._started = self._last = None

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` units; perhaps say so."""
        with self._guard:
            self._done += n
            now = self._clock()
            if self._started is None or self._last is None:
                # The clock starts with the first piece of work: what comes before it is the import of torch.
                self._started = self._last = now
            is_tenth = self._done - self._said >= self._total * _LINE_EVERY_SHARE
            # What takes no time needs no lines: a file of a few megabytes would give ten at once.
            if (is_tenth and now - self._started > 1) or now - self._last >= _LINE_EVERY_S:
                self._said, self._last = self._done, now
                self._say(self._describe(now - self._started))

    def _describe(self, elapsed: float) -> str:
        rate = self._done / elapsed if elapsed else 0.0
        left = (self._total - self._done) / rate if rate else 0.0
        minutes, seconds = divmod(round(left), 60)
        share = f"{self._done / self._total:4.0%}" if self._total else ""
        if self._unit == "B":
            amount = f"{format_bytes(self._done)} of {format_bytes(self._total)}, {format_bytes(rate)}/s"
        else:
            amount = f"{self._done} of {self._total} {self._unit}, {rate:.3g}/s"
        return f"{self._label}: {share} ({amount}, {minutes}:{seconds:02d} left)"

    def end(self) -> None:
        """Nothing more is said."""
