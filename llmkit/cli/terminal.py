"""What reaches the terminal: text from outside without control characters, over streams that are open.

Names, values and messages of files go into answers and errors. A control character in them could colour, hide or forge
lines; here each becomes visible text (`\\x1b`). The layout's own line breaks and tabs stay.
"""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress
from typing import IO, Any

# C0 and C1 controls, DEL, line and paragraph separators, marks that turn the direction of writing, lone surrogates.
_FORMATS = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f{_FORMATS}]")
_LINE_CONTROLS = re.compile(f"[\x00-\x1f{_FORMATS}]")
_STREAM_CONTROLS = re.compile(
    f"[\x00-\x08\x0b\x0c\x0e-\x1f{_FORMATS}]"
)  # a library's bar goes back to its line's start
_JSON_CONTROLS = re.compile(f"[{_FORMATS}]")


def clean(text: str, *, is_line: bool = False) -> str:
    """The text with every control character spelt out; with `is_line` also line breaks and tabs."""
    return (_LINE_CONTROLS if is_line else _CONTROLS).sub(_spelt, text)


def clean_json(text: str) -> str:
    """A JSON document with JSON's own escapes for what a terminal would obey and JSON allows to stand there."""
    return _JSON_CONTROLS.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _spelt(match: re.Match[str]) -> str:
    code = ord(match[0])
    escapes = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return escapes.get(match[0]) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


class _Clean(io.TextIOBase):
    """A stream for what libraries write: their warnings quote files, too."""

    def __init__(self, raw: IO[str]) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        with suppress(OSError):  # nobody listens
            self.raw.write(_STREAM_CONTROLS.sub(_spelt, text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.raw.flush()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def fileno(self) -> int:
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def clean_stream(raw: IO[str]) -> IO[str]:
    """A stream that cleans what is written to it."""
    return _Clean(raw)  # type: ignore[return-value]


def raw_stderr() -> IO[str]:
    """The stream behind a cleaned sys.stderr, for bars, which move the cursor and clean their own texts."""
    stream = sys.stderr
    return stream.raw if isinstance(stream, _Clean) else stream


def open_streams() -> None:
    """Give a process that was started with closed streams others, and clean what libraries write to stderr.

    Without it the next file that is opened would be number 1 or 2, and messages would be written into it. The stdout
    that was closed stays one that nothing can be written to, so that a lost answer is an error. Characters that the
    terminal's encoding lacks are spelt out.
    """
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
    for name, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = clean_stream(sys.stderr)
