"""An ordered stage: blocks computed one after the other, each from the state that the one before it left.

A step of a plan may need work whose parts build on each other (a layer is calibrated with the layers before it
quantized). Such work keeps what it made in a folder inside `OUT.partial/`, block by block:

    blocks.jsonl              a journal: a line for each block that is whole, with the hashes of its two files
    000007.results.safetensors
    000007.state.safetensors  what block 8 starts from; that of block 6 is removed then

Killed anywhere, a block is done or not done, and a rerun of the same work goes on behind the last one that is done. The
folder is removed before the output is finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from llmkit.pipeline.commit import sync_folder, write_synced
from llmkit.pipeline.journal import Journal
from llmkit.pipeline.target import disk_errors

if TYPE_CHECKING:
    import torch

__all__ = ["Stage"]

_JOURNAL = "blocks.jsonl"

Tensors = Mapping[str, "torch.Tensor"]


class Stage:
    """The blocks of one piece of work.

    Args:
        folder: where they are kept; made where there is none, inside a folder that exists. None keeps them in memory.
        digest: identifies the work: blocks of other work are dropped.

    Attributes:
        n_done: blocks that are whole.
        n_reused: those that an earlier run had done.

    Raises:
        OutputError: the disk is full.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder, self._work = folder, digest
        self._kept: list[tuple[Tensors, Tensors]] = []
        self._notes: list[Mapping[str, Any]] = []
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
                with closing(self._journal()) as journal:
                    self._notes = self._sound(journal.entries)
                if len(self._notes) < len(journal.entries):  # files were damaged: all of it anew
                    self._journal(resume=False).close()
        self.n_reused = len(self._notes)

    def _journal(self, *, resume: bool = True) -> Journal:
        """Open while a line is written: the folder around this one has the lock."""
        return Journal(self._path_of(_JOURNAL), self._work, resume=resume)

    @property
    def n_done(self) -> int:
        """Blocks that are whole."""
        return len(self._notes)

    def _sound(self, entries: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
        """The entries, if every file that is still needed is as it was written; else none."""
        last = len(entries) - 1
        for i, entry in enumerate(entries):
            kinds = ("results", "state") if i == last else ("results",)
            if entry.get("block") != i or any(_digest(self._path(i, kind)) != entry.get(kind) for kind in kinds):
                return []
        return list(entries)

    def _path(self, block: int, kind: str) -> Path:
        return self._path_of(f"{block:06}.{kind}.safetensors")

    def _path_of(self, name: str) -> Path:
        return (self._folder or Path()) / name

    def commit(self, results: Tensors, state: Tensors, note: Mapping[str, Any] | None = None) -> None:
        """The next block is whole.

        Args:
            results: what it made.
            state: what the block after it starts from.
            note: plain data to keep with it.
        """
        block = self.n_done
        entry = {"block": block, "note": dict(note or {})}
        if self._folder is None:
            self._kept = [*((r, {}) for r, _ in self._kept), (dict(results), dict(state))]
        else:
            from safetensors.torch import save

            for kind, tensors in (("results", results), ("state", state)):
                path, data = self._path(block, kind), save({k: t.contiguous() for k, t in tensors.items()})
                with disk_errors(path):
                    write_synced(path, data)
                entry[kind] = xxh3_128(data).hexdigest()
            with disk_errors(self._folder):
                sync_folder(self._folder)
                with closing(self._journal()) as journal:
                    journal.append(entry)
                if block:
                    self._path(block - 1, "state").unlink(missing_ok=True)
        self._notes.append(entry)

    def results(self, block: int) -> dict[str, torch.Tensor]:
        """What a block made, that is done."""
        return self._load(block, "results")

    def state(self) -> dict[str, torch.Tensor]:
        """What the last block that is done left; nothing before the first."""
        return self._load(self.n_done - 1, "state") if self.n_done else {}

    def note(self, block: int) -> Mapping[str, Any]:
        """The plain data kept with a block."""
        found: Mapping[str, Any] = self._notes[block]["note"]
        return found

    def _load(self, block: int, kind: str) -> dict[str, torch.Tensor]:
        if self._folder is None:
            return dict(self._kept[block][0 if kind == "results" else 1])
        from safetensors.torch import load_file

        loaded: dict[str, torch.Tensor] = load_file(self._path(block, kind))
        return loaded


def _digest(path: Path) -> str | None:
    hasher = xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
    except OSError:
        return None
    return hasher.hexdigest()
