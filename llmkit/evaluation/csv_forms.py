"""The columns of each benchmark's published files, and the documents that lm-eval's tasks make of them.

mmlu    no header: question, A, B, C, D, answer               -> question, subject, choices, answer (0 to 3)
ceval   a header: id, question, A, B, C, D, answer[, explanation] -> the columns under their names
cmmlu   a header: (unnamed), Question, A, B, C, D, Answer      -> the columns under their names
mmlu_pro  Parquet, all subjects in one file: question, options, answer, cot_content, category -> as they are
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, counted, listing
from llmkit.evaluation import csv_file, mmlu_pro_file, parquet_file
from llmkit.evaluation.csv_file import Row
from llmkit.evaluation.documents import FOUR

Doc = dict[str, Any]
_PARTS = ("question", *FOUR)


@dataclass(frozen=True)
class Form:
    """One benchmark's published CSV layout.

    Attributes:
        path: pattern of a file's path below the data folder.
        header: the first line as published; None where a file begins with its first question.
        document: makes lm-eval's document of a question's cells by part (id, question, A to D, answer, explanation).
        whole: reads a subject's documents out of a file that has those of all subjects.
    """

    path: str
    header: tuple[str, ...] | None
    document: Callable[[Mapping[str, str], str], Doc]
    whole: Callable[[Path, str], list[Doc]] | None = None

    def part(self, column: str) -> str:
        """The part of a question that stands below a column's name, whatever its case."""
        name = column.strip()
        return name.upper() if name.upper() in FOUR else name.lower() or "id"


def _mmlu(cells: Mapping[str, str], subject: str) -> Doc:
    answer = FOUR.index(cells["answer"]) if cells["answer"] else -1
    return {"question": cells["question"], "subject": subject, "choices": [cells[x] for x in FOUR], "answer": answer}


def _ceval(cells: Mapping[str, str], subject: str) -> Doc:
    return {part: cells.get(part, "") for part in ("id", *_PARTS, "answer", "explanation")}


def _cmmlu(cells: Mapping[str, str], subject: str) -> Doc:
    return {"Question": cells["question"], **{x: cells[x] for x in FOUR}, "Answer": cells["answer"]}


FORMS: Mapping[str, Form] = {
    "mmlu": Form("{split}/{subject}_{split}.csv", None, _mmlu),
    "ceval": Form("{split}/{subject}_{split}.csv", ("id", *_PARTS, "answer"), _ceval),
    "cmmlu": Form("{split}/{subject}.csv", ("", "Question", *FOUR, "Answer"), _cmmlu),
    "mmlu_pro": Form(mmlu_pro_file.PATTERN, None, lambda cells, subject: dict(cells), mmlu_pro_file.read_category),
}


@dataclass(frozen=True)
class Split:
    """The questions of one file.

    Attributes:
        docs: as lm-eval's tasks expect them, in the order of the file.
        is_labelled: whether it has the answers.
        repeated: places of questions that stand in the file before, with the same choices.
        empty: places of questions of which a choice is empty.
    """

    docs: list[Doc]
    is_labelled: bool = True
    repeated: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def _other_separator(cells: Sequence[str], n: int) -> str | None:
    """What to do about a row that has its cells, between other marks than commas."""
    text = ",".join(cells)
    found = next((name for mark, name in ((";", "semicolons"), ("\t", "tabs")) if text.count(mark) == n - 1), None)
    return f"its cells stand between {found}: save it with commas" if found else None


def has_answers(docs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the right answers of documents are known."""
    return all(doc.get("answer", doc.get("Answer")) not in ("", -1) for doc in docs)


def read_split(path: Path, form: str, subject: str) -> Split:
    """The questions of one CSV file, or of one of the hub's Parquet files, whose columns have names always.

    Raises:
        InputError: not such a file (see `csv_file.read_rows`), a wrong number of cells, a missing column, an empty
            question, an answer that is not A to D, an id that stands twice; names the file, the line the row begins
            on, the column.
    """
    layout = FORMS[form]
    if layout.whole is not None:
        return Split(layout.whole(path, subject))
    is_parquet = path.suffix == ".parquet"
    rows = parquet_file.read_rows(path) if is_parquet else csv_file.read_rows(path)
    header = list(layout.header or (*_PARTS, "answer"))
    if is_parquet or layout.header is not None:
        header = _header(path, rows, layout)
        rows = rows[1:]
    elif rows and {layout.part(cell) for cell in rows[0].cells} >= {"question", "answer"}:
        raise InputError(
            f"{path}, {rows[0].place}: a header ({listing(rows[0].cells, 6)}), where the published files have none",
            hint="delete the line, and put the columns in the order question, A, B, C, D, answer",
        )
    read = _Reading(path, header, [layout.part(name) for name in header])
    cells = [read.cells(row) for row in rows]
    return Split(
        docs=[layout.document(c, subject) for c in cells],
        is_labelled=read.is_labelled(cells, rows),
        repeated=read.repeated,
        empty=read.empty,
    )


def _header(path: Path, rows: Sequence[Row], layout: Form) -> list[str]:
    published = ",".join(layout.header or (*_PARTS, "answer"))
    hint = f"the published files begin with the line {published}"
    if not rows:
        raise InputError(f"{path}: empty", hint=hint)
    header = rows[0].cells
    parts = [layout.part(name) for name in header]
    if "question" not in parts:
        raise InputError(f"{path}, {rows[0].place}: no header; found {listing(header, 8)}", hint=hint)
    if absent := [part for part in _PARTS if part not in parts]:
        raise InputError(
            f"{path}, {rows[0].place}: the header lacks {listing(absent, 6)}; found {listing(header, 8)}", hint=hint
        )
    if double := [header[i] for i, part in enumerate(parts) if part in parts[:i]]:
        raise InputError(f"{path}, {rows[0].place}: the header names {double[0] or 'no column'} twice", hint=hint)
    if "E" in header:
        raise InputError(
            f"{path}, {rows[0].place}, column {header.index('E') + 1}: a fifth choice, E; the benchmark has A to D"
        )
    return header


class _Reading:
    """Rows of one file under its header, and what is odd about them."""

    def __init__(self, path: Path, header: Sequence[str], parts: Sequence[str]) -> None:
        self._path = path
        self._header = header
        self._parts = parts
        self._place_of_id: dict[str, str] = {}
        self._seen: set[tuple[str, ...]] = set()
        self.repeated: list[str] = []
        self.empty: list[str] = []

    def cells(self, row: Row) -> dict[str, str]:
        """Part -> cell of a row; the answer as A to D, or empty where there is none."""
        if len(row.cells) != len(self._parts):
            raise InputError(
                f"{self._path}, {row.place}: {counted(len(row.cells), 'cell')}, expected {len(self._parts)} "
                f"({', '.join(self._parts)})",
                hint=_other_separator(row.cells, len(self._parts))
                or "a question has four choices, and a cell that holds a comma, a quote or a line break is quoted",
            )
        cells = dict(zip(self._parts, row.cells, strict=True))
        if not cells["question"].strip():
            raise InputError(f"{self.place(row, 'question')}: the cell is empty")
        if not all(cells[x].strip() for x in FOUR):
            self.empty.append(row.place)
        answer = unicodedata.normalize("NFKC", cells.get("answer", "")).strip().upper()
        if answer and answer not in FOUR:
            raise InputError(f"{self.place(row, 'answer')}: the answer is {cells['answer']!r}, expected A, B, C or D")
        self._check_id(row, cells.get("id", "").strip())
        key = tuple(cells[part] for part in _PARTS)
        if key in self._seen:
            self.repeated.append(row.place)
        self._seen.add(key)
        return cells | {"answer": answer}

    def is_labelled(self, cells: Sequence[Mapping[str, str]], rows: Sequence[Row]) -> bool:
        """Whether all rows have an answer; False where none has.

        Raises:
            InputError: some have and some have not.
        """
        without = [row for row, c in zip(rows, cells, strict=True) if not c["answer"]]
        if without and len(without) < len(rows):
            raise InputError(f"{self.place(without[0], 'answer')}: the answer is '', expected A, B, C or D")
        return not without

    def place(self, row: Row, part: str) -> str:
        """File, line and column of a cell."""
        at = self._parts.index(part)
        return f"{self._path}, {row.place}, column {at + 1} ({self._header[at]})"

    def _check_id(self, row: Row, name: str) -> None:
        if name and name in self._place_of_id:
            raise InputError(
                f"{self.place(row, 'id')}: the id {name} is also that of {self._place_of_id[name]}",
                hint="number the questions from 0 on",
            )
        self._place_of_id[name] = row.place
