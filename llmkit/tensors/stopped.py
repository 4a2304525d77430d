"""How a step that takes long gives up when its run was stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IsStopped = Callable[[], bool]


class Stopped(Exception):
    """The run was stopped while a step was computed; nothing of the step counts."""


class _OfThread(threading.local):
    is_stopped: IsStopped = staticmethod(lambda: False)


_of_thread = _OfThread()


def stop_of_thread() -> IsStopped:
    """Whether the run that this thread computes for was stopped: for a pool, whose threads take it over."""
    return _of_thread.is_stopped


def take_over(is_stopped: IsStopped) -> None:
    """This thread computes for a run that is stopped when `is_stopped` says so."""
    _of_thread.is_stopped = is_stopped


@contextmanager
def stoppable(is_stopped: IsStopped) -> Iterator[None]:
    """Inside, this thread computes for a run that is stopped when `is_stopped` says so."""
    before = stop_of_thread()
    take_over(is_stopped)
    try:
        yield
    finally:
        take_over(before)


def raise_if_stopped() -> None:
    """Called now and then in loops that may take more than a second, wherever they are.

    Raises:
        Stopped: the run was stopped.
    """
    if _of_thread.is_stopped():
        raise Stopped
