"""Names of lm-eval's tasks, looked up in its files: to import it, and to have it index them, takes seconds."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from llmkit.errors import InputError, suggestion
from llmkit.evaluation.benches import bench_names

_NAMED = re.compile(rb"^(?:task|group|tag): *[\"']?([\w.-]+)", re.MULTILINE)


def check_task_names(names: Collection[str], include: Path | None = None) -> None:
    """Refuse, in a fraction of a second, a task name that is in none of lm-eval's files.

    Args:
        include: a folder with definitions besides lm-eval's own.

    Raises:
        InputError: there is such a name.
    """
    left, present = {name.encode() for name in names}, set[bytes]()
    for data in _texts(include) if names else ():
        present.update(_NAMED.findall(data))
        left = {name for name in left if name not in data}
        if not left:
            return
    if present:  # lm-eval has its tasks where they are looked for
        raise unknown_task(min(left).decode(), [name.decode() for name in present])


def task_names(include: Path | None = None) -> list[str]:
    """The names that lm-eval's files, and those of a folder besides, give to tasks, groups and tags."""
    return sorted({name.decode() for data in _texts(include) for name in _NAMED.findall(data)})


def unknown_task(name: str, names: Collection[str]) -> InputError:
    """The error for a name that is none of lm-eval's tasks `names`."""
    return InputError(
        f"no benchmark or lm-eval task {name!r} (benchmarks: {', '.join(bench_names())}; lm-eval tasks: {len(names)})",
        hint=suggestion(name, [*bench_names(), *names], "lm_eval ls tasks prints lm-eval's own", "--bench "),
    )


def _texts(include: Path | None) -> Iterator[bytes]:
    spec = importlib.util.find_spec("lm_eval")
    own = spec.submodule_search_locations if spec is not None else None
    for folder in [*(Path(path) / "tasks" for path in (own or [])[:1]), *([include] if include is not None else [])]:
        yield from _files(folder)


def _files(folder: Path) -> Iterator[bytes]:
    pending = [str(folder)] if folder.is_dir() else []
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.name.endswith((".yaml", ".yml", ".py")):
                    with open(entry.path, "rb", buffering=0) as file:
                        yield file.read()
