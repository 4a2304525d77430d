"""Ctrl-C and its kin: said at once, with what is kept; a second one ends the process where it stands.

Python takes a signal when the main thread is back from the library that it is in, and what runs in other threads ends
where a step of the work does. So a thread hears signals meanwhile. What is on the disk can be resumed from at any time.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llmkit.lazy_imports import ENDS

_GRACE_S = 0.3  # in which most commands are out
_AGAIN_S = 0.5  # `timeout` and launchers of several processes send one wish twice


class Interrupted(Exception):
    """Ctrl-C. Has its own class because Typer would turn a KeyboardInterrupt into a bare exit code.

    Attributes:
        is_resumable: the same command line goes on where this one stopped.
        kept: what became of the work.
        hint: what to do, where the command line alone does not go on.
    """

    def __init__(self, *, is_resumable: bool, kept: str = "", hint: str | None = None) -> None:
        super().__init__()
        self.is_resumable, self.hint = is_resumable, hint
        self.kept = kept or "nothing is kept: the same command starts anew"

    @property
    def message(self) -> str:
        """What to say."""
        return f"interrupted; {self.kept}"


Kept = Callable[[], Interrupted | None]
"""What becomes of the work where it is interrupted now; None: as outside of it."""


def _write(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _State:
    """What a signal that comes now means.

    Attributes:
        works: the innermost piece of work comes last.
        say: writes a line to stderr.
        is_heard: a signal has come.
        is_ending: the last word is being said.
    """

    def __init__(self) -> None:
        self.works: list[Kept] = []
        self.say: Callable[[str], None] = _write
        self.is_heard = self.is_ending = False

    def interrupted(self) -> Interrupted:
        for kept in reversed(self.works):
            with suppress(Exception):
                if (stop := kept()) is not None:
                    return stop
        return Interrupted(is_resumable=False)


_state = _State()


@contextmanager
def interruptible(kept: Kept) -> Iterator[None]:
    """Inside, an interrupt leaves what `kept` says, and becomes that `Interrupted`."""
    _state.works.append(kept)
    try:
        yield
    except KeyboardInterrupt:
        if (stop := kept()) is None:
            raise
        raise stop from None
    finally:
        _state.works.remove(kept)


@contextmanager
def said_by(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` writes a line that is due at once to stderr."""
    before, _state.say = _state.say, say
    try:
        yield
    finally:
        _state.say = before


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, as batch systems send it before they kill, and SIGHUP of a lost terminal are taken as Ctrl-C.

    What is done is kept, and said. What is ignored (nohup) stays so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in ENDS if is_main and signal.getsignal(s) is signal.SIG_DFL}
    for ending in before:
        signal.signal(ending, signal.default_int_handler)
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)


@contextmanager
def heard(end: Callable[[Interrupted], int], *, grace_s: float = _GRACE_S, again_s: float = _AGAIN_S) -> Iterator[None]:
    """Inside, for a process of its own: a signal is answered in a line if the process takes a moment to end.

    Args:
        end: says the last word and gives the exit code; called when a second one comes.
        grace_s: seconds after which the first is answered.
        again_s: seconds after which another is a second one.
    """

    def take(number: int, frame: object) -> None:
        """Interrupt the main thread once: what comes later must not disturb how it ends."""
        if not _state.is_heard:
            _state.is_heard = True
            raise KeyboardInterrupt

    handlers = {s: h for s in ENDS if (h := signal.getsignal(s)) is signal.default_int_handler}
    for ending in handlers:
        signal.signal(ending, take)
    heard_by, told_to = os.pipe()
    os.set_blocking(told_to, False)
    before = signal.set_wakeup_fd(told_to, warn_on_full_buffer=False)
    try:
        with suppress(RuntimeError):  # no thread to be had: signals are taken all the same
            threading.Thread(target=_listen, args=(heard_by, end, grace_s, again_s), daemon=True).start()
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told_to)
        for ending, handler in handlers.items():
            signal.signal(ending, handler)


def is_heard() -> bool:
    """Whether this process was asked to end: what a library makes of a KeyboardInterrupt is no error of its own."""
    return _state.is_heard


def is_ending() -> None:
    """The last word is being said: nothing more is to be."""
    _state.is_ending = True


def _listen(heard_by: int, end: Callable[[Interrupted], int], grace_s: float, again_s: float) -> None:
    began, is_said = 0.0, False
    while True:
        left = max(0.0, began + grace_s - time.monotonic()) if began and not is_said else None
        if not select.select([heard_by], [], [], left)[0]:
            is_said = True
            if not _state.is_ending:
                _state.say(f"stopping; {_state.interrupted().kept} (a second Ctrl-C ends it at once)")
            continue
        numbers = os.read(heard_by, 64)
        if not numbers:
            os.close(heard_by)
            return
        if not set(ENDS).intersection(numbers):
            continue
        if not began:
            began = time.monotonic()
        elif time.monotonic() - began >= again_s:
            os._exit(130 if _state.is_ending else end(_state.interrupted()))
