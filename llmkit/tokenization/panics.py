"""The tokenizers library's panics, at files that it does not expect."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

_REPORT = re.compile(rb"\n*thread '[^\n]*' (\([^\n]*\) )?panicked at ")  # to its end, which has no mark


class PanicError(RuntimeError):
    """A panic, with what it says."""


@contextmanager
def without_panic() -> Iterator[None]:
    """Make a `PanicError` of a panic, which Python sees as a BaseException and Rust reports on stderr besides."""
    try:
        with _without_report():
            yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise PanicError(str(error)) from error
        raise


@contextmanager
def _without_report() -> Iterator[None]:
    """Hold back what is written to the process's stderr, and write it afterwards without the report of a panic."""
    try:
        held = TemporaryFile()  # noqa: SIM115
        own = os.dup(2)
    except OSError:  # no room, or a closed stream
        yield
        return
    with held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            held.seek(0)
            if text := _REPORT.split(held.read(), maxsplit=1)[0]:
                os.write(2, text)
