"""The tokenizers library's panics, at files that it does not expect."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, Any

_REPORT = re.compile(rb"\n*thread '[^\n]*' (\([^\n]*\) )?panicked at ")  # to its end, which has no mark
_CALLS = ("_encode_plus", "_decode")  # the ways from transformers' tokenizers into the library, at texts and at ids


class PanicError(RuntimeError):
    """A panic, with what it says."""


@contextmanager
def without_panic() -> Iterator[None]:
    """Make a `PanicError` of a panic, which Python sees as a BaseException and Rust reports on stderr besides."""
    is_held = _stderr.hold()
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise PanicError(str(error)) from error
        raise
    finally:
        if is_held:
            _stderr.release()


class WithoutPanic:
    """A function of the library, called so that a panic is a `PanicError`: some texts only meet what panics."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **more: Any) -> Any:
        with without_panic():
            return self.function(*args, **more)


def guard(tokenizer: Any) -> Any:
    """A tokenizer of transformers' that calls the library so; itself."""
    for name in _CALLS if hasattr(tokenizer, "_tokenizer") else ():
        setattr(tokenizer, name, WithoutPanic(getattr(tokenizer, name)))
    return tokenizer


class _Stderr:
    """Holds back what is written to the process's stderr, and writes it afterwards without the report of a panic."""

    def __init__(self) -> None:
        self.lock, self.users, self.own = Lock(), 0, -1
        self.held: IO[bytes] | None = None

    def hold(self) -> bool:
        """Whether it is held back: not where it is closed, or where there is no room."""
        with self.lock:
            if not self.users:
                try:
                    self.held = self.held or TemporaryFile(buffering=0)  # noqa: SIM115
                    self.own = os.dup(2)
                except OSError:
                    return False
                os.dup2(self.held.fileno(), 2)
            self.users += 1
            return True

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users or self.held is None:
                return
            os.dup2(self.own, 2)
            os.close(self.own)
            if not self.held.tell():
                return
            self.held.seek(0)
            text = _REPORT.split(self.held.read(), maxsplit=1)[0]
            self.held.seek(0)
            self.held.truncate()
            if text:
                os.write(2, text)


_stderr = _Stderr()
