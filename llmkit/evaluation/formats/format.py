"""The seam of report formats: what one is, how it is found, how its files are written.

A format is an object of the entry point group `llmkit.report_formats`; its name is what `--format` takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkit.entry_points import by_name, entries
from llmkit.errors import InputError, OutputError
from llmkit.evaluation.record import RunRecord
from llmkit.evaluation.report_inputs import ReportInputs
from llmkit.pipeline.files import check_file, write_file

GROUP = "llmkit.report_formats"
_HEAD_NBYTES = 2048
_NOT_IN_FILES = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ReportFormat:
    """One form of a report.

    Attributes:
        name: what `--format` takes.
        what: one word or a few, for messages.
        endings: of the files that are written in it when no format is named; none for a format of a folder.
        render: the files by their path in the folder, those that speak of others before these, so that they are written
            when the others are there; a format of one file has it under "".
        mark: what stands at the beginning of each file, by which an earlier one is known that may be replaced.
    """

    name: str
    what: str
    endings: tuple[str, ...]
    render: Callable[[ReportInputs], Mapping[str, bytes]]
    mark: bytes

    def write(self, inputs: ReportInputs, path: Path) -> list[Path]:
        """Write the report and return its files; each is whole or not there.

        Raises:
            OutputError: another file lies there, or it cannot be written.
            InputError: the inputs have nothing for this format.
        """
        self.check(path)
        files = {path / name if name else path: data for name, data in self.render(inputs).items()}
        for file, data in reversed(files.items()):
            if file != path:
                _make_folder(file.parent)
            write_file(file, data, self.what, self._is_such)
        return list(files)

    def check(self, path: Path) -> None:
        """Refuse, before anything is read, a path where the report cannot be written.

        Raises:
            OutputError: saying what is there.
        """
        if self.endings:
            check_file(path, self.what, self._is_such)
        elif path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; {self.what} is a folder", hint="name a folder: -o FOLDER")

    def _is_such(self, head: bytes) -> bool:
        return not head or self.mark in head[:_HEAD_NBYTES]


def _make_folder(folder: Path) -> None:
    from llmkit.pipeline.target import disk_errors

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def when(record: RunRecord) -> datetime:
    """When a run was made; 1970 where its record does not tell."""
    try:
        return datetime.fromisoformat(record.created).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC)


def file_part(name: object) -> str:
    """A name from a record as one part of a path: it leads nowhere else, and every file system takes it."""
    return _NOT_IN_FILES.sub("_", str(name)).strip(". ") or "unknown"


def json_line(document: Mapping[str, Any]) -> str:
    """A JSON object on one line; lone surrogates, which UTF-8 cannot encode, become U+FFFD."""
    text = json.dumps(document, ensure_ascii=False)
    return _SURROGATE.sub("\ufffd", text) + "\n"


def formats() -> dict[str, ReportFormat]:
    """All formats by name."""
    return {e.name: by_name(GROUP, e.name, "--format", ReportFormat) for e in entries(GROUP)}


def format_for(path: Path, name: str | None) -> ReportFormat:
    """The format that is named, or that the ending of the file says.

    Raises:
        InputError: no such name, or an ending that no format has.
    """
    if name is not None:
        return by_name(GROUP, name, "--format", ReportFormat)
    known = formats()
    for each in known.values():
        if path.suffix.lower() in each.endings:
            return each
    endings = [ending for each in known.values() for ending in each.endings]
    raise InputError(
        f"{path}: the ending says no format; there are {', '.join(endings)}",
        hint=f"name one: --format {'|'.join(known)}",
    )
