"""Data sets of lm-eval's tasks from a folder instead of the hub.

Imported only when something is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from llmkit.errors import InputError, listing

_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".txt", ".zst", ".gz")
_OF_THE_HUB = ("revision", "trust_remote_code", "token", "cache_dir", "download_mode")


@contextmanager
def datasets_in(folder: Path | None) -> Iterator[None]:
    """Have `datasets.load_dataset` look for the hub's ids in `folder`; None leaves it as it is.

    A data set `OWNER/NAME` lies in `OWNER/NAME`, in `NAME`, or in the folder itself where that is called so, as
    `hf download` leaves it, or as files named by their splits (`test.jsonl`), those of a configuration in a folder of
    its name.
    """
    if folder is None:
        yield
        return
    load, is_shown = datasets.load_dataset, datasets.is_progress_bar_enabled()
    datasets.load_dataset = _loader(folder, load)
    datasets.disable_progress_bars()  # nothing is downloaded
    try:
        yield
    finally:
        datasets.load_dataset = load
        if is_shown:
            datasets.enable_progress_bars()


def _loader(folder: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    def load_local(path: str, name: str | None = None, **options: Any) -> Any:
        if "data_files" in options or Path(path).exists():  # a definition with files of its own
            return load(path, name, **options)
        found = _find(folder, path)
        options = {key: value for key, value in options.items() if key not in _OF_THE_HUB}
        known = datasets.get_dataset_config_names(str(found))
        if name is None or name in known:
            return load(str(found), name, **options)
        if (found / name).is_dir():
            return load(str(found), data_dir=name, **options)
        if _files(found):
            return load(str(found), **options)
        raise InputError(
            f"{found} has no configuration {name!r} of {path}, found {listing(known)}",
            hint=f"put its files, named by their splits, into {found / name}",
        )

    return load_local


def _find(folder: Path, path: str) -> Path:
    base = path.rpartition("/")[2]
    places = [folder / path, folder / base, *([folder] if folder.name == base else [])]
    for place in places:
        if place.is_dir():
            if not any(_files(p) for p in [place, *(q for q in place.rglob("*") if q.is_dir())]):
                raise InputError(
                    f"{place} has no data of {path}; expected files named by their splits, such as test.jsonl",
                    hint=f"hf download {path} --repo-type dataset --local-dir {place}",
                )
            return place
    raise InputError(
        f"{folder} has no data set {path}; expected a folder {path} or {base} in it",
        hint=f"hf download {path} --repo-type dataset --local-dir {folder / path}",
    )


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix in _ENDINGS]
