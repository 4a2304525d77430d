"""Where an output may be written: nothing is replaced or deleted without the user's consent."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmkit.checkpoint.manifest import MANIFEST_NAME, load_manifest
from llmkit.checkpoint.membership import belongs_to_model
from llmkit.checkpoint.statistics import KEY
from llmkit.errors import InputError, OutputError, listing
from llmkit.formats import imatrix, safetensors
from llmkit.formats.folder import is_weight_file
from llmkit.formats.paths import expanded
from llmkit.formats.unreadable import kind_of_entry
from llmkit.tensors.spec import format_bytes

_MOST_LINKS = 10_000  # entries of an input folder that are looked at for links into OUT
_JOURNAL_PREFIX = ".journal"


@dataclass(frozen=True)
class Target:
    """Where an output goes, and what it may replace.

    Attributes:
        out: the folder, or the file, that is to be.
        overwrite: replace what llmkit wrote there, an empty folder, or a folder with the files of a model alone.
        force: with `overwrite`, replace any other folder.
        inputs: files and folders that the output is made from; none of them is ever deleted.
        is_file: it is a file.
    """

    out: Path
    overwrite: bool = False
    force: bool = False
    inputs: tuple[Path, ...] = field(default=())
    is_file: bool = False

    def check(self, need_nbytes: int) -> None:
        """Refuse, before any work, an output that could not be committed.

        Raises:
            OutputError: the output exists, is an input, its parent is missing or the disk is too small.
        """
        self.check_place()
        if (shortage := self.shortage(need_nbytes)) is not None:
            raise shortage

    def check_place(self) -> None:
        """Refuse a place where nothing may be written, whatever its size.

        Raises:
            OutputError: the output exists, is an input, or its parent is missing.
        """
        out = self.out
        with disk_errors(out):
            require_parent(out)
            if not os.access(out.absolute().parent, os.W_OK):  # before its free space, of which there may be none
                raise OutputError(
                    f"cannot write {out}: {out.parent} is read-only, or may not be written by you",
                    hint="choose another -o, where you may write",
                )
            if out.name in ("", ".."):
                raise OutputError(f"{out} already exists", hint="name a new folder: -o OUT")
            self.check_replaced()
            partial = partial_path(out)
            if partial.is_symlink():
                raise OutputError(
                    f"{partial} is a link to elsewhere; it is where {out.name} is written before it is whole",
                    hint=f"remove the link: rm {shlex.quote(str(partial))}",
                )

    def shortage(self, need_nbytes: int) -> OutputError | None:
        """The error of a disk that is too small; None where there is room, what an earlier run wrote included."""
        partial = partial_path(self.out)
        with disk_errors(self.out):
            have = sum(p.lstat().st_blocks * 512 for p in partial.iterdir() if p.is_file()) if partial.is_dir() else 0
            free = shutil.disk_usage(self.out.parent).free
        if need_nbytes <= free + have:
            return None
        return OutputError(
            f"{self.out}: needs {format_bytes(need_nbytes)}, the disk has {format_bytes(free + have)} free",
            hint="free some space or choose another -o",
        )

    def check_replaced(self) -> None:
        """Refuse to replace what is at OUT now; nothing may be there without `overwrite`.

        Raises:
            OutputError: naming what would be lost.
        """
        out = self.out
        if not os.path.lexists(out):
            return
        self._check_inputs()
        is_alike = out.is_file() if self.is_file else out.is_dir()
        if not self.overwrite:
            or_replace = ", or add --overwrite to replace it" if is_alike else ""
            raise OutputError(f"{out} already exists", hint=f"choose another -o{or_replace}")
        if not is_alike:
            raise OutputError(
                f"{out} is no {'file' if self.is_file else 'folder'}; --overwrite will not delete it",
                hint="choose another -o",
            )
        if self.is_file:
            self._check_file()
            return
        here = Path.cwd()
        if _resolved(out) in (here, *here.parents, expanded("~")):
            raise OutputError(f"{out} is the folder you are in, or holds it", hint="choose another -o")
        foreign = foreign_names(out)
        if foreign and not self.force:
            what = f"it holds {listing(foreign, 4)}"
            raise OutputError(
                f"{out} is no checkpoint folder that llmkit may replace: {what}, which would be deleted",
                hint=f"choose another -o; --overwrite --force deletes all of {out}",
            )

    def _check_file(self) -> None:
        """A file may replace one of its own kind only."""
        with self.out.open("rb") as file:
            head = file.read(_HEAD_NBYTES)
        is_its_kind = _KINDS.get(self.out.suffix.lower(), lambda head: False)(head)
        if not is_its_kind and not self.force:
            raise OutputError(
                f"{self.out} is no {self.out.suffix.lstrip('.')} file, which --overwrite would replace",
                hint="choose another -o; --overwrite --force deletes it",
            )

    def _check_inputs(self) -> None:
        place, itself = _resolved(self.out), identity_of(self.out)
        for path in self.inputs:
            for reached in _places(path):
                above = (reached, *reached.parents)
                if place in above or (self.out.is_dir() and itself in map(identity_of, above)):
                    raise OutputError(
                        f"{self.out} holds an input ({path}), which would be deleted",
                        hint="write to another folder: -o OUT",
                    )


_HEAD_NBYTES = 4096
# A safetensors file that holds a model's weights is no file of statistics.
_KINDS: Mapping[str, Callable[[bytes], bool]] = {
    ".gguf": lambda head: head.startswith(b"GGUF"),
    ".safetensors": lambda head: safetensors.looks_like(head) and f'"{KEY}"'.encode() in head,
    ".dat": imatrix.looks_binary,
}


def partial_path(out: Path) -> Path:
    """The folder that becomes `out`, or in which it is made."""
    return _beside(out, ".partial")


def replaced_path(out: Path) -> Path:
    """Where the old output is kept during the commit, if the system cannot exchange two names."""
    return _beside(out, ".replaced")


def _beside(out: Path, suffix: str) -> Path:
    place = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    return place.parent / (place.name + suffix)


def foreign_names(folder: Path) -> list[str]:
    """What `folder` holds that neither llmkit wrote nor belongs to a model; all of it where it holds no model."""
    names = sorted(p.name + "/" * (p.is_dir() and not p.is_symlink()) for p in folder.iterdir())
    try:
        manifest = load_manifest(folder)
        files = manifest.get("files")
        written = {MANIFEST_NAME, *(files if isinstance(files, dict) else ())}
    except InputError:
        written = set()
        if names and not any(is_weight_file(n) for n in names):
            return names
    return [n for n in names if n not in written and not belongs_to_model(n) and not n.startswith(_JOURNAL_PREFIX)]


def _places(path: Path) -> Iterator[Path]:
    """All paths of an input: its name, its target, and the targets of links inside it."""
    yield _resolved(path.parent) / path.name  # a link in a hub's cache lies elsewhere than what it leads to
    yield _resolved(path)
    if path.is_dir():
        for link in _links(path):
            yield _resolved(link)


def identity_of(path: Path) -> tuple[int, int] | None:
    """What a file system knows a folder by, which has another path where it is mounted once more."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, OSError):  # links in a circle
        return path.absolute()


def _links(folder: Path) -> Iterable[Path]:
    seen = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            seen += 1
            if seen > _MOST_LINKS:
                return
            linked = Path(place, name)
            if linked.is_symlink():
                yield linked


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn OS errors while writing into an `OutputError` with a hint."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"cannot write {path}: {error.strerror}",
                hint="the disk (FAT32: 4 GB) or `ulimit -f` takes no file so large: choose another -o, or, where the "
                "layout has shards, --max-shard-size 2GB",
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"cannot write {path}: {error.strerror}",
                hint="free some space and run the same command again: it resumes",
            ) from error
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = "choose another -o, where you may write" if refused else "choose another -o"
        raise OutputError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error


def require_parent(path: Path) -> None:
    """Refuse a path whose folder is not there.

    Raises:
        OutputError: with the command that makes it, or with what stands in its place.
    """
    if path.absolute().parent.is_dir():
        return
    there = next((p for p in path.parents if os.path.lexists(p)), path)
    if not there.is_dir():
        kind = kind_of_entry(there) or "a file, no folder"
        raise OutputError(f"cannot write {path}: {there} is {kind}", hint="choose another -o")
    raise OutputError(
        f"cannot write {path}: the folder {path.parent} does not exist",
        hint=f"mkdir -p {shlex.quote(str(path.parent))}",
    )
