"""lm-eval's index of its tasks, made of those of its 14,000 files that may define what is asked for.

To index them all takes lm-eval ten seconds. Files are chosen by their text and that of the files which they include; of
those that have a name lm-eval itself makes the index, so that what the name stands for is the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval.tasks

_INCLUDE = re.compile(rb"""^["']?include["']?[ \t]*:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)
_PATH = re.compile(r"[^\s\"',\[\]#-][^\s\"',\[\]#]*")
Listing = Callable[[Path], Iterable[Path]]


def task_manager(names: Sequence[str] | None = None, include: Path | None = None) -> Any:
    """A `TaskManager` that has `names`, as far as there are such, and the tasks, groups and tags that belong to them.

    Args:
        names: None has all.
        include: a folder with definitions besides lm-eval's own, which win.
    """
    try:
        from lm_eval.tasks._index import TaskIndex

        listing: Listing = TaskIndex._iter_yaml_files
    except (ImportError, AttributeError):  # another version
        names = None
    if names is None:
        return lm_eval.tasks.TaskManager(include_path=None if include is None else str(include))
    wanted: set[str] = set()
    more = set(names)
    while more:
        wanted |= more
        has_any = _mentioning(wanted)
        chosen = lambda root: (p for p, text in _texts(root, listing).items() if has_any(text))  # noqa: B023, E731
        with replaced(TaskIndex, "_iter_yaml_files", staticmethod(chosen)):
            manager = task_manager(None, include)
        more = _reached(manager.task_index, names) - wanted
    return manager


def _mentioning(names: Iterable[str]) -> Callable[[bytes], bool]:
    """Whether a text has one of the names, as a word."""
    words = [(name.encode(), re.compile(rb"(?<!\w)" + re.escape(name.encode()) + rb"(?!\w)")) for name in names]
    return lambda text: any(name in text and pattern.search(text) is not None for name, pattern in words)


def _reached(index: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """`names`, and those that groups and tags among them have, and so on."""
    reached: set[str] = set()
    pending = [*names]
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        if (entry := index.get(name)) is not None:
            pending += entry.tags if entry.kind.name == "TAG" else _members((entry.cfg or {}).get("task"))
    return reached


def _members(value: Any) -> Iterator[str]:
    """The names in a group's list, which may hold groups of its own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _members([value.get("task"), value.get("group")])
    elif isinstance(value, list):
        for each in value:
            yield from _members(each)


def _texts(root: Path, listing: Listing) -> Mapping[Path, bytes]:
    """lm-eval's files below a folder, in its order -> their text and that of all that they include."""
    return _own_texts(root, listing) if root == Path(lm_eval.tasks.__file__).parent else _read_texts(root, listing)


def _read_texts(root: Path, listing: Listing) -> dict[Path, bytes]:
    included: dict[str, bytes] = {}

    def text_of(path: str) -> bytes:
        if path not in included:
            included[path] = b""  # a circle ends here
            try:
                text = Path(path).read_bytes()
            except OSError:  # lm-eval leaves out what includes it
                return b""
            folder = os.path.dirname(path)
            others = [p for value in _INCLUDE.findall(text) for p in _PATH.findall(value.decode("utf-8", "replace"))]
            parts = [text_of(os.path.normpath(os.path.join(folder, os.path.expanduser(p)))) for p in others]
            included[path] = b"\n".join([text, *parts])
        return included[path]

    return {path: text_of(str(path)) for path in listing(root)}


_own_texts = lru_cache(maxsize=1)(_read_texts)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of lm-eval's replaced for a while; where its version has none, nothing is done."""
    if not hasattr(owner, name):
        yield
        return
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
