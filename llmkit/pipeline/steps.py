"""How an output is written, whatever it is made of: steps in threads, each noted in the journal, and one rename."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from llmkit.pipeline.commit import Partial, finish_earlier
from llmkit.pipeline.pool import run_all
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.pipeline.target import Target
from llmkit.pipeline.writer import Writer
from llmkit.tensors.source import SourceFile
from llmkit.tensors.stopped import Stopped, stoppable

Entry = dict[str, Any]
"""What the journal says of a finished step; JSON."""


class NamedStep(Protocol):
    """A step: a part of the output that is written, noted and resumed as one."""

    @property
    def name(self) -> str:
        """Unique among the steps."""


Step = TypeVar("Step", bound=NamedStep)


class StepRunner(ABC, Generic[Step]):
    """Runs steps in threads. A step that the journal has, and whose bytes the disk still has, is not done again.

    Attributes:
        writer: of the output files.
        entries: what was noted of each finished step, by its name.
        stop: set when a step failed or the user interrupted: steps in flight end as soon as they see it.
    """

    def __init__(self, partial: Partial, progress: Progress) -> None:
        self.partial = partial
        self.progress = progress
        self.writer = Writer(partial)
        self.entries: dict[str, Entry] = {}
        self.stop = threading.Event()
        self._n_resumed = self._nbytes_resumed = 0
        self._guard = threading.Lock()

    @abstractmethod
    def perform(self, step: Step) -> Entry | None:
        """Write a step; what is to be noted of it, None where the run was stopped meanwhile."""

    @abstractmethod
    def written_nbytes(self, step: Step, entry: Entry) -> int | None:
        """The bytes of a step that was written before; None where the disk does not have what `entry` says."""

    def run(self, steps: Iterable[Step], pool: ThreadPoolExecutor) -> None:
        """Run all steps. The first error ends all."""
        run_all(pool, self._run, steps, self.stop)

    def resumed(self) -> dict[str, int]:
        """How much of it earlier runs had done, for the manifest."""
        return {"steps_resumed": self._n_resumed, "nbytes_resumed": self._nbytes_resumed}

    def _run(self, step: Step) -> None:
        if self.stop.is_set():
            return
        entry = self.partial.done.get(step.name)
        nbytes = self.written_nbytes(step, entry) if entry is not None else None
        if nbytes is None:
            try:
                with stoppable(self.stop.is_set):
                    entry = self.perform(step)
            except Stopped:
                return
            if entry is None:
                return
            self.partial.record(step.name, entry)
        else:
            self.progress.advance(nbytes, step.name)
        with self._guard:
            self.entries[step.name] = entry or {}
            if nbytes is not None:
                self._n_resumed += 1
                self._nbytes_resumed += nbytes


@dataclass(frozen=True)
class Work:
    """What is to be written.

    Attributes:
        digest: identifies it: another run goes on where one with the same digest was interrupted.
        need_nbytes: bytes that the disk must have free.
        sources: the files that are read, as they were opened.
        n_steps: how many steps there are.
        step_nbytes: bytes that they write.
    """

    digest: str
    need_nbytes: int
    sources: Collection[SourceFile]
    n_steps: int = 0
    step_nbytes: int = 0


def write_output(
    work: Work,
    target: Target,
    write: Callable[[Partial], dict[str, Any]],
    *,
    label: str,
    more_nbytes: int = 0,
    check: Callable[[], None] = lambda: None,
    resume: bool = True,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Write an output into `OUT.partial/` and make it final. What an earlier run had finished is not written again.

    Args:
        write: writes all but the manifest, which it returns.
        label: says in the progress what is done.
        more_nbytes: the progress counts them besides those of the steps.
        check: more that may refuse, before anything is written.
        resume: continue an interrupted run of the same work.

    Returns:
        The manifest; its entry "run" says how long it took and how much was resumed.

    Raises:
        OutputError: the output exists or cannot be written.
        InputError: an input was changed meanwhile.
    """
    resumed = {"steps_resumed": work.n_steps, "nbytes_resumed": work.step_nbytes}
    if (finished := finish_earlier(target, work.digest)) is not None:
        return {**finished, "run": {**finished["run"], **resumed}}
    target.check(work.need_nbytes)
    check()
    started = time.monotonic()
    progress.begin(work.step_nbytes + more_nbytes, label, "B")
    try:
        with Partial(target, work.digest, resume=resume) as partial:
            if partial.finished is not None:
                partial.commit()
                return {**partial.finished, "run": {**partial.finished["run"], **resumed}}
            manifest = write(partial)
            elapsed = round(time.monotonic() - started, 3)
            manifest["run"] = {"elapsed_s": elapsed, **manifest.get("run", {})}
            partial.finish(manifest, work.sources)
    finally:
        progress.end()
    return manifest
