"""Nothing is at its final path until it is whole: `OUT.partial/`, a journal, fsync, one rename.

What a killed run left is read from the folders alone:

    OUT.partial/ with a journal                     not finished: the same plan goes on, another one starts anew
    OUT.partial/ with a manifest and no journal     finished, but for the rename to OUT
    OUT/ with a journal                             finished: it replaced what its journal names, which is to be removed
    OUT, and OUT.partial/ with a journal and no more   finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from llmkit.checkpoint.manifest import MANIFEST_NAME, load_manifest, sealed
from llmkit.errors import InputError, OutputError
from llmkit.pipeline.journal import Journal, read_journal
from llmkit.pipeline.rename import exchange, rename_new
from llmkit.pipeline.sharing import Sharing, share_file
from llmkit.pipeline.target import Target, disk_errors, partial_path, replaced_path
from llmkit.tensors.source import SourceFile

JOURNAL = ".journal.jsonl"
WORKSPACE = ".blocks"


class Partial:
    """The unfinished output: its folder, its lock, its journal.

    Attributes:
        done: entries of the journal of an earlier run of the same plan, by step name.
        has_records: whether any step is finished, so that resuming is worth something.
        finished: the manifest, where an earlier run of the same plan had finished all but the last rename.
    """

    def __init__(self, target: Target, digest: str, *, resume: bool = True) -> None:
        self.target = target
        self.out = target.out
        self.path = partial_path(target.out)
        self.digest = digest
        with disk_errors(self.path):
            self.finished = self._prepare(resume)
            self._journal = Journal(self.path / JOURNAL, digest, resume=resume, subject=str(self.out), clear=self.clear)
        self.done = {
            e["step"]: e for e in self._journal.entries if isinstance(e.get("step"), str) and self.finished is None
        }
        self.has_records = bool(self.done) or self.finished is not None

    def _prepare(self, resume: bool) -> dict[str, Any] | None:
        """Make the folder; what an earlier run finished in it."""
        if self.path.is_symlink():
            raise OutputError(f"{self.path} is a link to elsewhere", hint=f"remove it: rm {self.path}")
        self.path.mkdir(exist_ok=True)
        if (self.path / JOURNAL).exists() or not any(self.path.iterdir()):
            return None
        try:
            manifest = load_manifest(self.path)
        except InputError:
            manifest = None
        run = manifest.get("run") if manifest is not None else None
        if not isinstance(run, dict) or (run.get("plan"), run.get("out")) != (self.digest, self.out.name):
            raise OutputError(
                f"{self.path} exists and is not llmkit's unfinished {self.out.name}",
                hint=f"move it away, or choose another -o than {self.out}",
            )
        return manifest if resume else None

    def clear(self) -> None:
        """Remove what an earlier run wrote, unless that is all of it."""
        if self.finished is not None:
            return
        for path in self.path.iterdir():
            if path.name != JOURNAL:
                _remove(path)

    @property
    def workspace(self) -> Path:
        """A folder for what steps keep until all are done; the first that needs it makes it."""
        return self.path / WORKSPACE

    def clear_workspace(self) -> None:
        """All steps are done."""
        if self.workspace.exists():
            with disk_errors(self.path):
                _remove(self.workspace)

    @property
    def _has_work(self) -> bool:
        """Whether anything is there that a resumed run would take."""
        return self.has_records or self.workspace.exists()

    def record(self, step: str, entry: dict[str, Any]) -> None:
        """Note that a step is written. Its hashes are checked again before a resumed run trusts it."""
        with disk_errors(self.path / JOURNAL):
            self._journal.append({"step": step, **entry})
        self.has_records = True

    def write_file(self, name: str, data: bytes) -> None:
        """Write and sync a small file."""
        with disk_errors(self.path / name):
            write_synced(self.path / name, data)

    def link(self, name: str, source: Path) -> Sharing:
        """Link `source` into the folder (reflink, hard link or copy)."""
        path = self.path / name
        with disk_errors(path):
            path.unlink(missing_ok=True)
            return share_file(source, path)

    def finish(self, manifest: dict[str, Any], sources: Iterable[SourceFile] = ()) -> None:
        """Add the manifest, and make all of it final.

        Args:
            sources: the files that were read.

        Raises:
            InputError: one of them is not as it was when it was opened.
            OutputError: OUT came into being meanwhile and may not be replaced, or the disk is full.
        """
        for source in sources:
            source.check_unchanged()
        manifest["run"] = {**manifest.get("run", {}), "plan": self.digest, "out": self.out.name}
        if not self.target.is_file:
            self.write_file(MANIFEST_NAME, _manifest_bytes(manifest))
        self.commit()

    def commit(self) -> None:
        """Make the output final: fsync the folder, rename it."""
        with disk_errors(self.out):
            sync_folder(self.path)
            if self.target.is_file:
                self._commit_file()
            elif os.path.lexists(self.out) and self.target.overwrite:
                self._commit_over()
            else:
                self._journal.remove()
                self._rename(self.path)
            sync_folder(self.out.parent)
        self.close()

    def _rename(self, path: Path) -> None:
        try:
            rename_new(path, self.out)
        except FileExistsError as error:
            raise OutputError(
                f"{self.out} came into being while it was written, and stays as it is",
                hint="move it away (or add --overwrite) and run the same command again: it goes on from here",
            ) from error

    def _commit_file(self) -> None:
        """Rename a single file, over an older one or to a free name."""
        written = self.path / self.out.name
        if os.path.lexists(self.out) and self.target.overwrite:
            self.target.check_replaced()
            os.replace(written, self.out)
        else:
            self._rename(written)
        self._journal.remove()
        self.path.rmdir()

    def _commit_over(self) -> None:
        """Replace the folder at OUT; the old one is removed afterwards, and the journal stays until then."""
        self.target.check_replaced()
        old = self.path
        self._journal.append({"replaced": old.name})
        if not exchange(self.path, self.out):
            old = replaced_path(self.out)
            self._journal.append({"replaced": old.name})
            rename_new(self.out, old)
            self._rename(self.path)
        sync_folder(self.out.parent)
        _remove(old)
        self._journal.path = self.out / JOURNAL
        self._journal.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """What stays of an unfinished run: all after Ctrl-C, finished steps after a full disk, nothing otherwise."""
        if kind is None:
            return
        is_kept = issubclass(kind, KeyboardInterrupt) or (issubclass(kind, OutputError) and self._has_work)
        if is_kept:
            self.close()
        else:
            self.discard()

    def discard(self) -> None:
        """Remove what was written, which cannot be resumed."""
        if not (self.out / JOURNAL).exists():  # what is at OUT.partial after an exchange is no longer ours to judge
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock; what was written stays for a resumed run."""
        self._journal.close()


def finish_earlier(target: Target, digest: str) -> Mapping[str, Any] | None:
    """Finish the commit of a killed run; returns its manifest if it was a run of this plan.

    Raises:
        OutputError: that run is still at it.
    """
    out, partial, aside = target.out, partial_path(target.out), replaced_path(target.out)
    with disk_errors(out):
        if not os.path.lexists(out):
            if os.path.lexists(aside) and aside.name in _replaced(partial):
                rename_new(aside, out)  # killed between two renames: the old one takes its place again
            return None
        left = _names(partial)
        if left == [JOURNAL] or (target.is_file and left == [] and partial.is_dir()):
            if left:
                Journal(partial / JOURNAL, "", subject=str(out)).remove()
            partial.rmdir()
        replaced = _replaced(out)
        if not replaced or not target.overwrite:
            return None
        plan = read_journal(out / JOURNAL)[0]["plan"]
        journal = Journal(out / JOURNAL, plan, subject=str(out))
        for old in (partial, aside):
            if old.name in replaced and os.path.lexists(old) and not (old / JOURNAL).exists():
                _remove(old)
        journal.remove()
        return load_manifest(out) if plan == digest else None


def _replaced(folder: Path) -> list[str]:
    """Names of the files that the folder replaced, from its journal."""
    return [str(e["replaced"]) for e in read_journal(folder / JOURNAL) if "replaced" in e]


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def sync_folder(path: Path) -> None:
    """Fsync a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else []


def add_findings(folder: Path, findings: Mapping[str, Any]) -> None:
    """Add to the entry "run" of a finished folder's manifest what was measured of it since.

    Raises:
        InputError: the folder has no manifest.
        OutputError: the disk is full, or may not be written.
    """
    manifest = load_manifest(folder)
    manifest["run"] = {**manifest.get("run", {}), **findings}
    path = folder / MANIFEST_NAME
    with disk_errors(path):
        write_synced(partial_path(path), _manifest_bytes(manifest))
        os.replace(partial_path(path), path)
        sync_folder(folder)


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(sealed(manifest), indent=1) + "\n").encode()


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link, whose target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
