"""The output of commands: answers on stdout, everything else on stderr, in one of three modes.

In human mode an answer is rendered as text. With `--json` stdout holds exactly one document. With `-q` it holds the
bare answer (a path, a number) or nothing, and stderr only errors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from llmkit.cli.progress import Bar, Lines, StatusLine
from llmkit.cli.tables import aligned
from llmkit.cli.terminal import clean, clean_json, raw_stderr
from llmkit.errors import InputError, listing
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.pipeline.progress import duration as duration


class Mode:
    """How a command answers."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class AnswerLost(OSError):
    """stdout cannot be written: a full disk."""


@dataclass(frozen=True)
class Output:
    """The one way a command speaks.

    Attributes:
        mode: one of `Mode`.
        verbosity: 0, or the number of `-v`.
        given: parameters that stood on the command line -> the option, as it is spelt.
        status_line: the line that a terminal shows while nothing is said.
    """

    mode: str = Mode.HUMAN
    verbosity: int = 0
    given: Mapping[str, str] = field(default_factory=dict)
    status_line: StatusLine = field(default_factory=StatusLine)

    @property
    def is_human(self) -> bool:
        """True when text is wanted."""
        return self.mode == Mode.HUMAN

    @property
    def is_json(self) -> bool:
        """True when one document is wanted."""
        return self.mode == Mode.JSON

    def answer(self, document: Mapping[str, Any], render: Callable[[], None], brief: str | None = None) -> None:
        """The answer of the command, once.

        Args:
            document: what `--json` prints.
            render: writes it for people, through `line`, `table` and `record`.
            brief: what `-q` prints.
        """
        if self.mode == Mode.JSON:
            self._write_json(json.dumps(finite(document), indent=1, ensure_ascii=False, default=_plain))
        elif self.mode == Mode.QUIET:
            if brief is not None:
                self._write(brief)
        else:
            render()

    def line(self, text: str = "") -> None:
        """A line of a human answer."""
        self._write(text)

    def text(self, piece: str) -> None:
        """A piece of streamed text, shown at once; as it is where no terminal would obey it."""
        self._put(clean(piece) if sys.stdout.isatty() else piece, flush=True)

    def record(self, pairs: Mapping[str, object]) -> None:
        """Names and values, one pair a line; None is left out."""
        shown = {k: str(v) for k, v in pairs.items() if v is not None}
        width = max(map(len, shown), default=0)
        for key, value in shown.items():
            first, *rest = value.split("\n")
            self._write(f"{key:<{width}}  {first}".rstrip())
            for more in rest:
                self._write(" " * (width + 2) + more)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
        """Rows under a header; the columns named in `right` are numbers, which stand at the right.

        In a terminal the table fits the window; elsewhere each row is one line, whatever its length.
        """
        cells = [["" if cell is None else clean(str(cell), is_line=True) for cell in row] for row in rows]
        window = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in aligned(columns, cells, right, window):
            self._write(line)

    def note(self, text: str) -> None:
        """What was decided and is worth knowing."""
        if self.is_human:
            self._say(text)

    def hint(self, text: str) -> None:
        """A command to run next."""
        if self.is_human:
            self._say(f"hint: {text}")

    def warning(self, text: str) -> None:
        """Something that the user can act on. Also with `--json`: stderr is free there."""
        if self.mode != Mode.QUIET:
            self._say(f"warning: {text}")

    def urgent(self, text: str) -> None:
        """What is said in every mode, at once."""
        self._say(text)

    def error(self, kind: str, message: str, hint: str | None = None) -> None:
        """Why the command did not do it."""
        if self.mode == Mode.JSON:
            document = {"error": {"kind": kind, "message": message, "hint": hint}}
            self._write_json(json.dumps(document, indent=1, ensure_ascii=False))
            return
        self._say(f"error: {message}")
        if hint:
            self._say(f"hint: {hint}")

    def refuse_options(self, unhonoured: Iterable[str], path: str, hint: str | None = None) -> None:
        """Refuse options of the command line that the way it goes now would ignore, whatever their value.

        Args:
            unhonoured: names of parameters.
            path: the way, in words.

        Raises:
            InputError: one of them was given.
        """
        ignored = [self.given[name] for name in sorted(unhonoured) if name in self.given]
        if ignored:
            verb = "is" if len(ignored) == 1 else "are"
            hint = hint or f"leave {', '.join(ignored)} out"
            raise InputError(f"{listing(ignored)} {verb} not for {path}", hint=hint)

    def refuse(self, message: str, hint: str | None = None) -> NoReturn:
        """Print that the answer is no, beside the answer itself, and exit with code 1.

        An answer is no error, and is not called one.
        """
        from typer import Exit

        if self.mode != Mode.JSON:
            self._say(message)
            if hint:
                self._say(f"hint: {hint}")
        raise Exit(1)

    def progress(self) -> Progress:
        """Draws the progress of long work: a bar in a terminal, a line now and then elsewhere."""
        if not self.is_human or os.environ.get("LLMKIT_NO_PROGRESS"):
            return NO_PROGRESS
        return Bar(self.status_line) if _is_terminal() else Lines(self._say)

    def at_work(self, label: str) -> Output:
        """This output with a status line that names `label` while nothing else is shown: in a terminal, for people."""
        is_shown = self.is_human and not self.verbosity and not os.environ.get("LLMKIT_NO_PROGRESS") and _is_terminal()
        return replace(self, status_line=StatusLine(label, raw_stderr() if is_shown else None))

    def doing(self, label: str) -> None:
        """Change the text of the status line."""
        self.status_line.doing(label)

    def _write(self, text: str) -> None:
        self._put(clean(text) + "\n")

    def _write_json(self, text: str) -> None:
        self._put(clean_json(text) + "\n")

    def _put(self, text: str, *, flush: bool = False) -> None:
        try:
            with self.status_line.writing(ends_line=text.endswith("\n") or not sys.stdout.isatty()):
                sys.stdout.write(text)
                if flush:
                    sys.stdout.flush()
        except BrokenPipeError:
            if flush:  # of a text that is streamed nobody wants the rest
                raise
            drop_stdout()  # the reader has enough of the answer; whether it is no, the exit code tells
        except OSError as error:
            raise AnswerLost(error.errno, error.strerror) from error

    def _say(self, text: str) -> None:
        """A message; its further lines are indented, so that text from outside can make none that looks like ours."""
        with suppress(OSError):  # an answer that is lost is told at the end
            sys.stdout.flush()
        with suppress(OSError), self.status_line.writing():  # nobody listens; the exit code tells
            sys.stderr.write(clean(text).replace("\n", "\n  ") + "\n")
            sys.stderr.flush()


def drop_stdout() -> None:
    """Replace stdout, whose reader has gone, so that writing and flushing it at exit raise nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _is_terminal() -> bool:
    """Whether stderr is a terminal in which a line can be drawn over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
