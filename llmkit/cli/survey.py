"""The survey of `lora extract`: its progress, and a stage beside OUT that keeps it when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmkit.cli.interrupts import Interrupted, interruptible
from llmkit.cli.options import WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.writing import interrupted_run
from llmkit.errors import RequirementError, SpecError

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.pipeline.stage import Stage
    from llmkit.transforms.lora.extract import Compare, Outcome


class SurveyStage:
    """The comparison of two models before `lora extract`: its progress, and the results kept in a file beside OUT."""

    def __init__(
        self, out: Output, base: Checkpoint, tuned: Checkpoint, writing: WriteOptions, options: Mapping[str, Any]
    ) -> None:
        from llmkit.pipeline.journal import is_journal
        from llmkit.pipeline.plan import refuse_file_name
        from llmkit.pipeline.stage import Stage
        from llmkit.pipeline.target import Target, partial_path

        self._tensors = tuned.tensors
        self._is_over = False
        self._interruptible = interruptible(self._kept)
        self._stage: Stage | None = None
        place = Path(writing.output)
        refuse_file_name(place)
        self._path = path = partial_path(place).with_suffix(".survey")
        self._is_resumable = not writing.no_resume
        if not os.path.lexists(partial_path(place)):
            if os.path.lexists(place) and is_journal(path) and not (writing.dry_run or writing.overwrite):
                path.unlink()  # the run that it belongs to was finished, and stopped before it could forget it
            Target(place, writing.overwrite, writing.force, tuple(writing.inputs)).check(0)
        if not writing.dry_run:
            digest = _digest(base, tuned, options)
            self._stage = Stage(path, digest, resume=not writing.no_resume, subject=str(place))
            if n_reused := len(self._stage.entries):
                out.note(f"{n_reused} of {len(self._tensors)} tensors were compared by the interrupted run")
        self._progress = out.progress()
        self._progress.begin(sum(t.spec.nbytes for t in self._tensors.values()), "comparing", "B")

    def __enter__(self) -> Self:
        from llmkit.tensors.loading import import_torch

        self._interruptible.__enter__()
        try:
            import_torch()
        except BaseException as error:  # no block is entered yet, so nobody else leaves it
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def findings(self, names: Sequence[str], compare: Compare) -> Iterator[tuple[str, Outcome]]:
        """The result of `compare` for each tensor, each a block of the stage."""
        from llmkit.pipeline.stage import BlockResult, Stage

        stage = self._stage or Stage(None, "")
        for block in stage.run(names, lambda name, _state: BlockResult({"finding": compare(name)}), is_valid=_is_valid):
            if block.name in self._tensors:
                self._progress.advance(self._tensors[block.name].spec.nbytes, block.name)
            yield block.name, block.result["finding"]

    def end(self) -> None:
        """End the progress: all tensors are compared."""
        self._is_over = True
        self._progress.end()

    def forget(self) -> None:
        """Remove the survey once the output is written."""
        if self._stage is not None:
            self._stage.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.end()
        if isinstance(error, RequirementError | SpecError):
            self.forget()  # the same command would end so again
        elif self._stage is not None:
            self._stage.close()
        self._interruptible.__exit__(kind, error, trace)

    def _kept(self) -> Interrupted | None:
        if self._is_over or self._stage is None:
            return None
        return interrupted_run(self._path, is_resumable=self._is_resumable)


def _is_valid(result: Mapping[str, Any]) -> bool:
    value = result.get("finding")
    return value in ("equal", "whole") or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _digest(base: Checkpoint, tuned: Checkpoint, options: Mapping[str, Any]) -> str:
    """Identifies the two models, as far as names, sizes and times of files tell, and the options of the comparison."""
    body = [base.fingerprints(), tuned.fingerprints()]
    return hashlib.sha256(json.dumps([body, dict(options)]).encode()).hexdigest()
