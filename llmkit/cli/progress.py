"""Two ways to show progress: a bar in a terminal, and a line each 10 % or 30 s elsewhere.

Between bars, a line in the terminal says that a command is at work: none stays quiet there for more than two seconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from llmkit.cli.terminal import clean, raw_stderr
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_LINE_EVERY_S = 30.0
_LINE_EVERY_SHARE = 0.1
_TELLING_SHARE = 0.01  # of the work, that has to be done first
_WIDE = 110  # columns; narrower terminals get a shorter bar, and one line all the same
_QUIET_S = 1.0  # after so long without a word the line of `StatusLine` appears
_USUAL = 80  # columns, where a terminal does not say
_NUMBERS_WIDTH = 40  # "1000.0/1000.0 MB", "1000.0 MB/s", "0:00:00" and the spaces around them


class StatusLine:
    """`loading vicuna-7b, 3 s`: the last line of a terminal while nothing else is written to it.

    Whoever writes to the terminal does so inside `writing` or `held`, so that the line is gone before.

    Args:
        label: what is being done.
        stream: the terminal; None draws nothing.
    """

    def __init__(self, label: str = "", stream: IO[str] | None = None) -> None:
        self.label = label
        self._stream = stream
        self._guard = threading.RLock()
        self._done = threading.Event()
        self._n_holders = 0
        self._is_drawn = self._is_amid_line = False
        self._began = self._last = time.monotonic()

    def __enter__(self) -> StatusLine:
        if self._stream is not None:
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        with self.writing():
            pass

    def doing(self, label: str) -> None:
        """From now on this is being done."""
        with self._guard:
            self.label, self._began = label, time.monotonic()

    @contextmanager
    def writing(self, *, ends_line: bool = True) -> Iterator[None]:
        """Something is written to the terminal; with `ends_line` false the cursor then stands within a line."""
        with self._guard:
            self._clear()
            self._is_amid_line = not ends_line
            yield
            self._last = time.monotonic()

    def hold(self) -> None:
        """Draw nothing: a bar is there, or the user types."""
        with self._guard:
            self._clear()
            self._n_holders += 1

    def release(self) -> None:
        """End one `hold`."""
        with self._guard:
            self._n_holders -= 1
            self._last = time.monotonic()

    def _run(self) -> None:
        while not self._done.wait(0.25):
            with self._guard:
                now = time.monotonic()
                is_free = not (self._n_holders or self._is_amid_line or self._done.is_set())
                if is_free and now - self._last >= _QUIET_S:
                    self._draw(f"{self.label}, {now - self._began:.0f} s")

    def _draw(self, text: str) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):  # nobody looks
                room = (os.get_terminal_size(self._stream.fileno()).columns or _USUAL) - 1
                self._stream.write(f"\r{clean(text, is_line=True)[:room]}\x1b[K")
                self._stream.flush()
        self._is_drawn = bool(text)

    def _clear(self) -> None:
        if self._is_drawn:
            self._draw("")


class Bar:
    """A bar with the amount done, the rate, the time left and what is being worked on.

    Args:
        status_line: the line that stands there between bars.
    """

    def __init__(self, status_line: StatusLine | None = None) -> None:
        self._status_line = status_line or StatusLine()
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
            Task,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        class TimeLeft(TimeRemainingColumn):
            def render(self, task: Task) -> Text:
                is_known = _tells(task.completed, task.total or 0)
                return super().render(task) if is_known else Text("-:--:--", style="progress.remaining")

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
            TimeLeft(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._rich.add_task(clean(label, is_line=True), total=total, note="")
        self._status_line.hold()
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
                self._status_line.release()
            self._rich = None


def _tells(done: float, total: float) -> bool:
    """Whether what was done tells how long the rest will take."""
    return done >= total * _TELLING_SHARE


class Lines:
    """A line each tenth of the work, or each half minute, whichever comes first."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._guard = threading.Lock()
        self._total = 0
        self._done = 0
        self._said = 0
        self._label = self._unit = self._note = ""
        self._started: float | None = None
        self._last: float | None = None

    def begin(self, total: int, label: str, unit: str = "B") -> None:
        """Start to count to `total` units."""
        with self._guard:
            self._total, self._label, self._unit = total, label, unit
            self._done = self._said = 0
            self._started = self._last = None

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` units, and print a line if one is due."""
        with self._guard:
            self._done += n
            self._note = "" if n else note  # of a step that takes long
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
        share = f"{self._done / self._total:4.0%}" if self._total else ""
        if self._unit == "B":
            amount = f"{format_bytes(self._done)} of {format_bytes(self._total)}, {format_bytes(rate)}/s"
        else:
            form = ".0f" if rate >= 100 else ".3g"
            amount = f"{self._done} of {self._total} {self._unit}, {rate:{form}}/s"
        if self._note:
            return f"{self._label}: {share} ({self._note})"
        if not (rate and _tells(self._done, self._total)):
            return f"{self._label}: {share} ({amount})"
        minutes, seconds = divmod(round((self._total - self._done) / rate), 60)
        return f"{self._label}: {share} ({amount}, {minutes}:{seconds:02d} left)"

    def end(self) -> None:
        """No further lines."""
