"""A benchmark's questions on this machine, and where in a given folder they are.

They are CSV files as published, or Parquet files as the hub keeps them (`SUBJECT/SPLIT-*.parquet`).
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from llmkit.errors import InputError, listing
from llmkit.evaluation.benches import Bench
from llmkit.evaluation.csv_forms import FORMS, Doc, Split, read_split
from llmkit.formats.paths import expanded

_MAX_DEPTH = 4  # of the hub's cache: hub/datasets--OWNER--NAME/snapshots/COMMIT
_MAX_FOLDERS = 1000


@dataclass(frozen=True)
class LocalData:
    """A folder of files for one benchmark.

    Attributes:
        bench: with the scored split.
        folder: the folder that holds the splits.
        subjects: those with a file for the scored split, in the benchmark's order.
        missing: the benchmark's other subjects.
        unknown: subjects with a file that the benchmark does not have; they are left out.
        oddities: what was odd but could be read, by kind: file and line of each.
    """

    bench: Bench
    folder: Path
    subjects: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    oddities: dict[str, list[str]] = field(default_factory=dict)

    def paths(self, subject: str, split: str) -> list[Path]:
        """Where a subject's split is; where a CSV file would be, if there is none."""
        csv = self.folder / _csv_name(self.bench, subject, split)
        return _paths(self.bench, self.folder, split).get(subject) or [csv]

    def read(self, subject: str, *, shots: int, needs_answers: bool = True) -> dict[str, list[Doc]]:
        """A subject's scored split and, when there are shots, the split they come from.

        Args:
            needs_answers: the scored split has to have its answers.

        Raises:
            InputError: a missing or malformed file, two that differ, a split without answers, or fewer rows than shots.
        """
        bench = self.bench
        path, *others = self.paths(subject, bench.split)
        scored = self._read(path, subject, others)
        if not scored.docs:
            raise InputError(f"{path}: no questions")
        if needs_answers and not scored.is_labelled:
            hints = [f"score another split: --split {bench.labelled}"] if bench.split != bench.labelled else []
            hints += ["write what a leaderboard takes: --submission FILE"] if bench.split == bench.submitted else []
            raise InputError(
                f"{path}: the {bench.split} split has no answers, so that nothing can be scored",
                hint=", or ".join(hints) or None,
            )
        docs = {bench.split: scored.docs}
        if bench.shots_split == bench.split:
            return docs
        path, *others = self.paths(subject, bench.shots_split)
        shown = self._read(path, subject, others) if shots or path.is_file() else Split([])
        docs[bench.shots_split] = shown.docs
        if len(shown.docs) < shots:
            raise InputError(
                f"{path}: {len(shown.docs)} rows, but {shots} shots are asked for",
                hint=f"add --shots {len(shown.docs)}",
            )
        if shots and not shown.is_labelled:
            raise InputError(f"{path}: no answers, which the {shots} shots would show", hint="add --shots 0")
        return docs

    def _read(self, path: Path, subject: str, others: Sequence[Path]) -> Split:
        split = read_split(path, self.bench.csv, subject)
        if other := next((p for p in others if read_split(p, self.bench.csv, subject).docs != split.docs), None):
            raise InputError(
                f"{self.bench.title}, {subject}: its questions in {path} are others than those in {other}",
                hint=f"keep one: mv {quote(str(other))} {quote(f'{other}.old')}",
            )
        for kind, places in (
            ("questions that stand twice in their file, and count twice", split.repeated),
            ("questions with an empty choice", split.empty),
        ):
            self.oddities.setdefault(kind, []).extend(f"{path.name} {place}" for place in places)
        return split

    @property
    def warnings(self) -> list[str]:
        """What was odd in the files read so far, one line a kind."""
        return [f"{self.bench.title}: {kind}: {listing(places, 4)}" for kind, places in self.oddities.items() if places]


def find_data(bench: Bench, data: str | Path) -> LocalData:
    """The benchmark's CSV files in `data`, `data/<bench>`, `data/data`, around it, or deeper in it.

    Raises:
        InputError: no such folder, no file of the benchmark in it, or several folders with such files.
    """
    data = expanded(data)
    if not data.is_dir():
        raise _no_folder(bench, data)
    near = [data, data / bench.name, data / "data", *([data.parent] if data.name in bench.splits else [])]
    folder = next((f for f in near if _known(bench, f, bench.split)), None)
    if folder is None:
        found = [f for f in _below(data) if _is_mostly(bench, f)]
        if len(found) > 1:
            raise InputError(
                f"{data}: {bench.title} is in {listing([str(f) for f in found], 4)}", hint=f"--data {found[0]}"
            )
        folder = found[0] if found else None
    if folder is None:
        raise _nothing_there(bench, data, near)
    present = _subjects_in(bench, folder, bench.split)
    expected = [s.name for s in bench.subjects] or present
    return LocalData(
        bench=bench,
        folder=folder,
        subjects=tuple(s for s in expected if s in present),
        missing=tuple(s for s in expected if s not in present),
        unknown=tuple(s for s in present if s not in expected),
    )


def _no_folder(bench: Bench, data: Path) -> InputError:
    takes = f"--data takes the folder that holds {bench.split}/ and {bench.shots_split}/"
    if not data.exists():
        return InputError(f"{data}: no such folder", hint=takes)
    if data.is_file() and (command := _unpacking(data)):
        return InputError(f"{data}: an archive, not a folder", hint=command)
    return InputError(f"{data}: a file, not a folder", hint=takes)


def _unpacking(path: Path) -> str | None:
    """The command that unpacks an archive."""
    folder = path.with_name(path.name.split(".")[0])
    if zipfile.is_zipfile(path):
        return f"unzip {quote(str(path))} -d {quote(str(folder))}, then --data {quote(str(folder))}"
    if tarfile.is_tarfile(path):
        return f"tar -xf {quote(str(path))}, then --data with the folder that it makes"
    return None


def _nothing_there(bench: Bench, data: Path, near: list[Path]) -> InputError:
    for folder in near:
        if others := [split for split in bench.splits if _known(bench, folder, split)]:
            return InputError(
                f"{folder}: {bench.title} is there, but not its {bench.split} split; there is {listing(others)}",
                hint=f"score another split (--split {max(others, key=bench.labelled.__eq__)}), or add the files",
            )
    example = _csv_name(bench, bench.subjects[0].name if bench.subjects else "SUBJECT", bench.split)
    archives = [p for p in sorted(data.iterdir()) if p.is_file() and p.suffix in (".zip", ".tar", ".gz", ".tgz")]
    command = next((c for p in archives if (c := _unpacking(p))), None)
    return InputError(
        f"{data}: no {bench.title} file in it; expected files such as {example}",
        hint=command
        or f"unpack the published archive and give the folder that holds {bench.split}/ and {bench.shots_split}/",
    )


def _subjects_in(bench: Bench, folder: Path, split: str) -> list[str]:
    return list(_paths(bench, folder, split))


def _csv_name(bench: Bench, subject: str, split: str) -> str:
    return FORMS[bench.csv].path.format(subject=subject, split=split)


def _paths(bench: Bench, folder: Path, split: str) -> dict[str, list[Path]]:
    """Subject -> files of a split in a folder: the CSV file as published, Parquet files as the hub keeps them."""
    name = Path(_csv_name(bench, "", split))
    if FORMS[bench.csv].whole is not None:
        whole = sorted(folder.glob(name.name)) if folder.is_dir() else []
        return dict.fromkeys(bench.by_name, whole) if whole else {}
    place = folder / name.parent
    files = sorted(place.iterdir()) if place.is_dir() else []
    found = {p.name.removesuffix(name.name): [p] for p in files if p.name.endswith(name.name) and p.is_file()}
    hub = bench.splits.get(split, split)
    for path in sorted(p for pattern in (f"*/{hub}-*.parquet", f"*/{hub}/*.parquet") for p in folder.glob(pattern)):
        found.setdefault(path.relative_to(folder).parts[0], []).append(path)
    return found


def _known(bench: Bench, folder: Path, split: str) -> list[str]:
    present = _subjects_in(bench, folder, split)
    return [s for s in present if s in bench.by_name] if bench.subjects else present


def _is_mostly(bench: Bench, folder: Path) -> bool:
    """Whether most files of the scored split are subjects of the benchmark: benchmarks share names of subjects."""
    return 2 * len(_known(bench, folder, bench.split)) > len(_subjects_in(bench, folder, bench.split))


def _below(data: Path) -> Iterator[Path]:
    """Folders in `data`, near ones first, a bounded number of them."""
    level, n = [data], 0
    for _ in range(_MAX_DEPTH):
        deeper: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    inner = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
            except OSError:
                continue
            deeper += [folder / name for name in inner]
            n += len(inner)
            if n > _MAX_FOLDERS:
                return
        yield from deeper
        level = deeper
