"""An ordered stage: blocks computed one after the other, a state handed from each to the next, resumed per block.

For work whose results are needed before a plan can be made: comparing two models, calibrating layer by layer,
scoring. On disk it is a journal, and where blocks have tensors a folder beside it:

    PATH             one line per finished block: its name, its result, the hashes of its files
    PATH.data/       N.state  the tensors that the next block begins with; only those of the last block are there
                     N.kept   the tensors that are kept until the stage is removed

A block's files are synced before its line is written, and the state that it began with is removed after that. A run
killed at any point therefore finds the block done or not done, and the files of every block that counts.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from llmkit.errors import InputError, LlmkitError
from llmkit.lazy_imports import torch
from llmkit.pipeline.commit import sync_folder
from llmkit.pipeline.hashing import Hasher, hash_range
from llmkit.pipeline.journal import Journal
from llmkit.pipeline.target import disk_errors
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import SourceFile, bytes_of
from llmkit.tensors.spec import DType, TensorSpec

_DATA_FILE = re.compile(r"\d+\.(state|kept)")


@dataclass(frozen=True)
class BlockResult:
    """What one block gives.

    Attributes:
        result: what is noted in the journal; JSON. Read after the tensors, so that it may hold what was counted
            while they were made.
        state: (name, tensor of any dtype and shape) for the next block. A generator is written tensor by tensor, so
            that no more than one of them is in memory; it may read the state that this block began with.
        kept: tensors that are wanted later; written before `state`.
    """

    result: Mapping[str, Any] = field(default_factory=dict)
    state: Iterable[tuple[str, torch.Tensor]] = ()
    kept: Iterable[tuple[str, torch.Tensor]] = ()


@dataclass(frozen=True)
class Block:
    """A finished block.

    Attributes:
        kept: its kept tensors, read from the disk when they are loaded; valid until the stage is removed.
    """

    name: str
    result: Mapping[str, Any]
    kept: Mapping[str, Lazy]


Compute = Callable[[str, Mapping[str, Lazy]], BlockResult]
"""Gets a block's name and the state of the block before it (empty for the first), which it may load in part."""


class Stage:
    """The blocks of one piece of work, in order.

        with Stage(out.with_name("OUT.calibration"), digest) as stage:
            for block in stage.run(["embedding", "layer 0", "layer 1"], compute):
                use(block.result, block.kept)
            write_output()
            stage.remove()

    Leaving the `with` releases the lock and keeps the files, so that the same work goes on in another run.

    Args:
        path: the journal; its folder must exist. None keeps nothing: tensors go to a temporary folder.
        digest: identifies the work: inputs, settings, versions. Blocks of other work are dropped, their files removed.
        resume: take the blocks of an earlier run.
        subject: what is made, for messages.
        in_workspace: it lies in the workspace of a run, whose lock is enough: the journal is open only while a line
            is written.

    Attributes:
        entries: (name, result) of every block that earlier runs noted, in order, whether or not it is reused.

    Raises:
        OutputError: another process has it open, `path` is a file of another kind, or cannot be written.
    """

    def __init__(
        self, path: Path | None, digest: str, *, resume: bool = True, subject: str = "", in_workspace: bool = False
    ) -> None:
        self._digest = digest
        self._in_workspace = in_workspace
        self._folder = path.with_name(path.name + ".data") if path is not None else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._journal: Journal | None = None
        self._lines: list[dict[str, Any]] = []
        if path is not None:
            with disk_errors(path):
                if in_workspace:
                    path.parent.mkdir(exist_ok=True)
                self._journal = Journal(path, digest, resume=resume, subject=subject, clear=self._remove_data)
            self._lines = [line for line in self._journal.entries if _is_line(line)]
            if in_workspace:
                self._journal.close()
        self.entries: list[tuple[str, Mapping[str, Any]]] = [(line["block"], line["result"]) for line in self._lines]

    def run(
        self,
        blocks: Sequence[str],
        compute: Compute,
        *,
        is_valid: Callable[[Mapping[str, Any]], bool] = lambda result: True,
    ) -> Iterator[Block]:
        """Every block in order: first those that an earlier run finished, then the others as they are computed.

        Args:
            blocks: their names, each once.
            compute: called for each block that is not reused.
            is_valid: a noted result for which this is false is not reused, nor any block after it.

        Raises:
            OutputError: the disk is full; finished blocks stay.
        """
        lines = self._reusable(blocks, is_valid)
        before = lines[-1].get("state") if lines else None
        self._remove_data(file["file"] for file in (before, *(line.get("kept") for line in lines)) if file is not None)
        for line in lines:
            yield Block(line["block"], line["result"], self._opened(line.get("kept")))
        for name in blocks[len(lines) :]:
            state = self._opened(before)
            line = self._note(name, compute(name, state))
            if before is not None:
                for source in {id(r.source): r.source for lazy in state.values() for r in lazy.reads()}.values():
                    source.close()
                with suppress(OSError):
                    self._data_path(before["file"]).unlink()
            before = line.get("state")
            yield Block(name, line["result"], self._opened(line.get("kept")))

    def append(self, name: str, result: Mapping[str, Any]) -> None:
        """Note a block that has no tensors and that no other one begins with; names may come again.

        Raises:
            OutputError: the disk takes no more.
        """
        self._note(name, BlockResult(result))

    def close(self) -> None:
        """Release the lock; the files stay."""
        if self._journal is not None:
            self._journal.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def remove(self) -> None:
        """Release the lock and remove the files."""
        self._remove_data()
        if self._journal is not None:
            self._journal.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reusable(self, blocks: Sequence[str], is_valid: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
        """The journal's lines of the leading blocks whose files are complete on disk."""
        latest: list[dict[str, Any]] = []
        for line in self._lines:  # a block that was computed again takes the place of all that followed from the first
            at = next((i for i, entry in enumerate(latest) if entry["block"] == line["block"]), len(latest))
            latest[at:] = [line]
        lines: list[dict[str, Any]] = []
        for name, line in zip(blocks, latest, strict=False):
            if line["block"] != name or not is_valid(line["result"]) or not self._is_whole(line.get("kept")):
                break
            lines.append(line)
        if len(lines) < len(blocks):
            while lines and not self._is_whole(lines[-1].get("state")):
                lines.pop()
        return lines

    def _note(self, name: str, computed: BlockResult) -> dict[str, Any]:
        number = len(self._lines)
        line: dict[str, Any] = {"block": name}
        for kind, tensors in (("kept", computed.kept), ("state", computed.state)):
            if (file := self._write(f"{number}.{kind}", tensors)) is not None:
                line[kind] = file
        line["result"] = dict(computed.result)
        if self._journal is not None:
            path = self._journal.path
            with disk_errors(path):
                if self._in_workspace:
                    with closing(Journal(path, self._digest)) as journal:
                        journal.append(line)
                else:
                    self._journal.append(line)
        self._lines.append(line)
        return line

    def _write(self, name: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any] | None:
        """Write tensors into one file; gives their offsets and the file's hash, or None for no tensors."""
        places: dict[str, list[Any]] = {}
        hasher, offset, fd = Hasher(), 0, -1
        path = None
        try:
            for tensor_name, tensor in tensors:
                view = bytes_of(tensor.detach().cpu())
                path = path or self._data_path(name)
                places[tensor_name] = [DType.of(tensor.dtype).name, list(tensor.shape), offset]
                hasher.update(view)
                offset += len(view)
                with disk_errors(path):
                    if fd < 0:
                        path.parent.mkdir(exist_ok=True)
                        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
                    while len(view):
                        view = view[os.write(fd, view) :]
            if path is None:
                return None
            with disk_errors(path):
                os.fsync(fd)
        finally:
            if path is not None and fd >= 0:
                with disk_errors(path):
                    os.close(fd)
        with disk_errors(path):
            sync_folder(path.parent)
        return {"file": name, "nbytes": offset, "xxh3": hasher.hexdigest(), "tensors": places}

    def _is_whole(self, file: Mapping[str, Any] | None) -> bool:
        """Whether a file of the journal exists with the bytes that were written."""
        if file is None:
            return True
        try:
            source = SourceFile(self._data_path(file["file"]))
            return bool(source.nbytes == file["nbytes"] and hash_range(source, 0, source.nbytes) == file["xxh3"])
        except (LlmkitError, OSError):
            return False

    def _opened(self, file: Mapping[str, Any] | None) -> dict[str, Lazy]:
        """Lazy tensors of a file of the journal."""
        if file is None:
            return {}
        source = SourceFile(self._data_path(file["file"]))
        return {
            name: Read(name, TensorSpec(DType[dtype], tuple(shape)), source, offset).output()
            for name, (dtype, shape, offset) in file["tensors"].items()
        }

    def _data_path(self, name: str) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="llmkit-stage-")
            self._folder = Path(self._temporary.name)
        if self._folder.is_symlink():
            raise InputError(f"{self._folder} is a link to elsewhere", hint=f"remove it: rm {self._folder}")
        return self._folder / name

    def _remove_data(self, keep: Iterable[str] = ()) -> None:
        """Remove the files of all blocks but `keep`, then the folder if it is empty; foreign files stay."""
        folder, kept = self._folder, set(keep)
        if folder is None or folder.is_symlink() or not folder.is_dir():
            return
        with disk_errors(folder):
            for path in list(folder.iterdir()):
                if _DATA_FILE.fullmatch(path.name) and path.name not in kept:
                    path.unlink()
            if not any(folder.iterdir()) and self._temporary is None:
                folder.rmdir()


def _is_line(line: Mapping[str, Any]) -> bool:
    """Whether a line of the journal has the form that `Stage` writes."""
    return (
        isinstance(line.get("block"), str)
        and isinstance(line.get("result"), dict)
        and all(isinstance(line[kind], dict) for kind in ("kept", "state") if kind in line)
        and all(_DATA_FILE.fullmatch(str(line[kind].get("file"))) for kind in ("kept", "state") if kind in line)
    )
