"""A single file that a command writes (a record, a draft): whole or not there, never in another file's place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from llmkit.errors import OutputError
from llmkit.pipeline.commit import sync_folder, write_synced
from llmkit.pipeline.rename import rename_new
from llmkit.pipeline.target import disk_errors, partial_path, require_parent

_HEAD_NBYTES = 1 << 16


def check_file(path: Path, what: str, is_such: Callable[[bytes], bool]) -> None:
    """Refuse a path where a file cannot be written, or where one lies that is not of the kind to be written.

    Args:
        what: the kind in words: "a run record".
        is_such: told the first bytes of the file that is there, whether it is one, or the beginning of one.

    Raises:
        OutputError: saying what is there.
    """
    with disk_errors(path):
        require_parent(path)
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder", hint="name a file in it")
        for each in (path, partial_path(path)):
            if os.path.lexists(each) and not (each.is_file() and is_such(_head(each))):
                raise OutputError(
                    f"{each} already exists and is not {what}", hint="name another file, or move this one away"
                )
        if not os.access(path.absolute().parent, os.W_OK):
            raise OutputError(f"cannot write {path}: no permission", hint="choose another -o, where you may write")


def write_file(path: Path, data: bytes, what: str, is_such: Callable[[bytes], bool]) -> None:
    """Write a file, in the place of an earlier one of its kind.

    Raises:
        OutputError: see `check_file`; or the disk is full.
    """
    check_file(path, what, is_such)
    path = _link_target(path)
    partial = partial_path(path)
    with disk_errors(path):
        try:
            write_synced(partial, data)
            if path.exists():
                os.replace(partial, path)
            else:
                rename_new(partial, path)
        except FileExistsError as error:
            raise OutputError(f"{path} came into being while it was written, and stays as it is") from error
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.absolute().parent)


def _link_target(path: Path) -> Path:
    """The target of a link: that file is replaced, not the link."""
    return path.resolve() if path.is_symlink() else path


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_NBYTES)
