"""The survey of `lora extract`: its progress, and a journal beside OUT that keeps it when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from llmkit.cli.command import Interrupted
from llmkit.cli.options import Writing
from llmkit.cli.output import Output
from llmkit.errors import RequirementError, SpecError

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.pipeline.journal import Journal
    from llmkit.transforms.lora.extract import Finding

__all__ = ["Surveying"]


class Surveying:
    """A survey under way. Refuses an output that may not be written before anything is read.

    Attributes:
        known: what an interrupted run of the same command found.
    """

    def __init__(
        self, out: Output, base: Checkpoint, tuned: Checkpoint, writing: Writing, options: Mapping[str, Any]
    ) -> None:
        from llmkit.pipeline.journal import Journal, is_journal
        from llmkit.pipeline.target import Target, disk_errors, partial_path

        self._tensors = tuned.tensors
        self._is_over = False
        self.known: dict[str, Finding] = {}
        self._journal: Journal | None = None
        place = Path(writing.output)
        path = partial_path(place).with_suffix(".survey")
        if not os.path.lexists(partial_path(place)):
            if os.path.lexists(place) and is_journal(path) and not (writing.dry_run or writing.overwrite):
                path.unlink()  # the run that it belongs to was finished, and stopped before it could forget it
            Target(place, writing.overwrite, writing.force, tuple(writing.inputs)).check(0)
        if not writing.dry_run:
            with disk_errors(path):
                digest = _digest(base, tuned, options)
                self._journal = Journal(path, digest, resume=not writing.no_resume, subject=str(place))
            for entry in self._journal.entries:
                name, finding = entry.get("tensor"), entry.get("finding")
                if isinstance(name, str) and _is_finding(finding):
                    self.known[name] = finding
        if self.known:
            out.note(f"{len(self.known)} of {len(self._tensors)} tensors were compared by the interrupted run")
        self._progress = out.progress()
        self._progress.begin(sum(t.spec.nbytes for t in self._tensors.values()), "comparing", "B")
        for name in self.known:
            self._advance(name)

    def __enter__(self) -> Self:
        from llmkit.tensors.loading import import_torch

        import_torch()
        return self

    def tell(self, name: str, finding: Finding) -> None:
        """A tensor is compared."""
        if self._journal is not None:
            from llmkit.pipeline.target import disk_errors

            with disk_errors(self._journal.path):
                self._journal.append({"tensor": name, "finding": finding})
        self._advance(name)

    def _advance(self, name: str) -> None:
        if name in self._tensors:
            self._progress.advance(self._tensors[name].spec.nbytes, name)

    def end(self) -> None:
        """All tensors are compared."""
        self._is_over = True
        self._progress.end()

    def forget(self) -> None:
        """The output is written, and what was found is of no more use."""
        if self._journal is not None:
            self._journal.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.end()
        if isinstance(error, RequirementError | SpecError):
            self.forget()  # the same command would end so again
        elif self._journal is not None:
            self._journal.close()
        if isinstance(error, KeyboardInterrupt) and not self._is_over:
            raise Interrupted(is_resumable=self._journal is not None) from None


def _is_finding(value: Any) -> TypeGuard[Finding]:
    return value in ("equal", "whole") or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _digest(base: Checkpoint, tuned: Checkpoint, options: Mapping[str, Any]) -> str:
    """Identifies the two models, as far as names, sizes and times of files tell, and what is asked of them."""
    body = [[[n, t.node.fingerprint(), t.index] for n, t in c.tensors.items()] for c in (base, tuned)]
    return hashlib.sha256(json.dumps([body, dict(options)]).encode()).hexdigest()
