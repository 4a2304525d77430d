"""MMLU-Pro's published Parquet files: one a split, with all categories in it (TIGER-Lab/MMLU-Pro)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.evaluation.documents import LETTERS
from llmkit.evaluation.parquet_file import read_records

PATTERN = "{split}-*.parquet"
_TEXTS = ("question", "answer", "category", "cot_content")
_MOST = 10  # options of a question


def read_category(path: Path, subject: str) -> list[dict[str, Any]]:
    """The documents of one category, as published.

    Raises:
        InputError: not such a file, or a question without a text, options or an answer among them; names the row.
        RequirementError: pyarrow is not installed.
    """
    records = _records(path, path.stat().st_mtime_ns if path.is_file() else 0)
    wanted = subject.replace("_", " ")
    return [_checked(path, row, record) for row, record in enumerate(records, 1) if record.get("category") == wanted]


@lru_cache(maxsize=2)
def _records(path: Path, modified: int) -> list[dict[str, Any]]:
    """All records: each of the categories asks for them."""
    records = read_records(path)
    names = list(records[0]) if records else []
    if absent := [name for name in (*_TEXTS, "options") if name not in names]:
        raise InputError(
            f"{path}: the column {absent[0]} is missing; found {listing(names, 8)}",
            hint="take the files of TIGER-Lab/MMLU-Pro as they are",
        )
    return records


def _checked(path: Path, row: int, record: dict[str, Any]) -> dict[str, Any]:
    where = f"{path}, row {row}"
    if other := [name for name in _TEXTS if not isinstance(record[name], str)]:
        raise InputError(f"{where}, column {other[0]}: expected a text, found {str(record[other[0]])[:40]}")
    options = record["options"]
    if not isinstance(options, list) or not all(isinstance(x, str) for x in options):
        raise InputError(f"{where}, column options: expected a list of texts, found {str(options)[:40]}")
    if not 2 <= len(options) <= _MOST:
        raise InputError(f"{where}, column options: {len(options)} options, expected 2 to {_MOST}")
    answer = record["answer"]
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise InputError(f"{where}, column answer: the answer is {answer!r}, expected A to {LETTERS[len(options) - 1]}")
    return record
