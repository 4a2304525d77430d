"""Calls in a pool of threads; the first failure cancels the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from llmkit.lazy_imports import torch
from llmkit.pipeline.cores import n_cores, n_threads
from llmkit.tensors.stopped import IsStopped, stop_of_thread, stoppable, take_over

T = TypeVar("T")
R = TypeVar("R")

_N_AT_A_TIME = 4  # each has its own activations


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Inside, torch computes with `n` threads in this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_cores() -> AbstractContextManager[None]:
    """Inside, torch uses every core, or as many as OMP_NUM_THREADS says: for a step that dominates the run.

    The runner gives each step one thread.
    """
    return torch_threads(n_threads())


@contextmanager
def threads_each(workers: int, n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool in whose threads torch computes with `n_threads` each."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=_begin, initargs=(n_threads, stop_of_thread())) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _begin(n_threads: int, is_stopped: IsStopped) -> None:
    torch.set_num_threads(n_threads)
    take_over(is_stopped)


def one_thread_each(workers: int) -> AbstractContextManager[ThreadPoolExecutor]:
    """A pool in whose threads torch computes with one thread each."""
    return threads_each(workers, 1)


def map_on_cores(function: Callable[[T], R], over: Iterable[T]) -> list[R]:
    """`function` of each of `over`, in parallel, one torch thread each; after an interrupt those at work are stopped.

    Small operations gain nothing from several threads.
    """
    is_stopped, interrupted = stop_of_thread(), threading.Event()
    either = stoppable(lambda: interrupted.is_set() or is_stopped())
    with either, one_thread_each(min(n_cores(), _N_AT_A_TIME)) as pool:
        try:
            return list(pool.map(function, over))
        except BaseException:
            interrupted.set()
            raise


def default_workers() -> int:
    """One worker a core that this process may use, at most eight: beyond that the disk is the limit."""
    return min(n_cores(), 8)


def run_all(pool: ThreadPoolExecutor, run: Callable[[T], None], over: Iterable[T], stop: threading.Event) -> None:
    """`run` for each of `over`, until all are done; what is thrown first, an interrupt too, is raised.

    Args:
        stop: is set then, so that calls in flight can end.
    """
    thrown: list[BaseException] = []

    def run_one(each: T) -> None:
        try:
            run(each)
        except BaseException as error:
            thrown.append(error)  # before the others stop, which may throw, too
            stop.set()
            raise

    with pool:
        try:  # from the first submission on: an interrupt there must stop the others, too
            futures = [pool.submit(run_one, each) for each in over]
            wait(futures, return_when=FIRST_EXCEPTION)
            if thrown:
                raise thrown[0]
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
