"""One Parquet file of a benchmark, as the hub keeps it, to the same rows that its CSV file has."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, RequirementError
from llmkit.evaluation.csv_file import Row, refuse_other_kinds


def read_rows(path: Path) -> list[Row]:
    """A row with the columns' names, then the rows as text: lists of choices as columns A, B, …, numbers as letters.

    Raises:
        InputError: no such file, or none of Parquet.
        RequirementError: pyarrow is not installed.
    """
    plain = [_flat(record) for record in read_records(path)]
    names = list(dict.fromkeys(name for record in plain for name in record))
    rows = [Row(f"row {i}", [record.get(name, "") for name in names]) for i, record in enumerate(plain, 1)]
    return [Row("columns", names), *rows]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, column -> value.

    Raises:
        InputError: no such file, or none of Parquet.
        RequirementError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RequirementError(f"{path}: needs pyarrow to be read", hint="pip install pyarrow") from error
    try:
        with path.open("rb") as file:
            head = file.read(256)
        refuse_other_kinds(path, head, but=b"PAR1")
        records: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({error})", hint="download it again") from error
    return records


def _flat(record: dict[str, Any]) -> dict[str, str]:
    """Name -> text of a record; its list of choices becomes one column for each letter."""
    cells: dict[str, str] = {}
    for name, value in record.items():
        if name == "choices" and isinstance(value, list):
            cells |= {letter: str(choice) for letter, choice in zip(string.ascii_uppercase, value, strict=False)}
        elif name == "answer" and isinstance(value, int):
            cells[name] = string.ascii_uppercase[value] if 0 <= value < 26 else ""
        else:
            cells[name] = "" if value is None else str(value)
    return cells
