"""The benchmarks' published CSV layouts: `{dev,val,test}/<subject>_<split>.csv`.

Cells are text and stay text: `0.50` stays `0.50` and `None` stays `None`, which number-guessing readers change.

    mmlu    no header: question, A, B, C, D, answer        -> question, subject, choices, answer (0 to 3)
    ceval   a header naming at least question, A, B, C, D, answer -> the columns under their names
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.evaluation.benches import Bench

Doc = dict[str, Any]
LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", *LETTERS, "answer")
_CEVAL_COLUMNS = ("id", *_COLUMNS, "explanation")


@dataclass(frozen=True)
class LocalData:
    """A folder of CSV files for one benchmark.

    Attributes:
        folder: the folder that holds the splits.
        subjects: those with a file for the scored split, in the benchmark's order.
        missing: the benchmark's other subjects.
        unknown: subjects with a file that the benchmark does not have; they are left out.
    """

    bench: Bench
    folder: Path
    subjects: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    def path(self, subject: str, split: str) -> Path:
        """Where a subject's split is."""
        return self.folder / split / f"{subject}_{split}.csv"

    def read(self, subject: str, *, shots: int) -> dict[str, list[Doc]]:
        """A subject's scored split and, when there are shots, the split they come from.

        Raises:
            InputError: a missing or malformed file, or fewer rows than shots.
        """
        bench = self.bench
        docs = {bench.split: read_split(self.path(subject, bench.split), bench.csv, subject)}
        if not docs[bench.split]:
            raise InputError(f"{self.path(subject, bench.split)}: no questions")
        shots_path = self.path(subject, bench.shots_split)
        docs[bench.shots_split] = read_split(shots_path, bench.csv, subject) if shots or shots_path.is_file() else []
        if len(docs[bench.shots_split]) < shots:
            raise InputError(
                f"{shots_path}: {len(docs[bench.shots_split])} rows, but {shots} shots are asked for",
                hint=f"add --shots {len(docs[bench.shots_split])}",
            )
        return docs


def find_data(bench: Bench, data: str | Path) -> LocalData:
    """The benchmark's CSV files in `data`, `data/<bench>` or `data/data` (as MMLU's archive unpacks).

    Raises:
        InputError: no such folder, or no file of the benchmark in it.
    """
    data = Path(data).expanduser()
    if not data.is_dir():
        raise InputError(f"{data}: no such folder", hint=f"--data takes a folder with {bench.split}/ and dev/ in it")
    for folder in (data, data / bench.name, data / "data"):
        present = _subjects_in(folder, bench.split)
        expected = [s.name for s in bench.subjects] or present
        subjects = [s for s in expected if s in present]
        if subjects:
            missing = [s for s in expected if s not in present]
            unknown = [s for s in present if s not in expected]
            return LocalData(bench, folder, tuple(subjects), tuple(missing), tuple(unknown))
    example = f"{bench.split}/{bench.subjects[0].name if bench.subjects else 'SUBJECT'}_{bench.split}.csv"
    raise InputError(
        f"{data}: no {bench.title} file in it; expected files such as {example}",
        hint=f"unpack the published archive and give the folder that holds {bench.split}/ and {bench.shots_split}/",
    )


def _subjects_in(folder: Path, split: str) -> list[str]:
    ending = f"_{split}.csv"
    inside = (folder / split).iterdir() if (folder / split).is_dir() else []
    return sorted(p.name.removesuffix(ending) for p in inside if p.name.endswith(ending) and p.is_file())


def read_split(path: Path, form: str, subject: str) -> list[Doc]:
    """The questions of one CSV file, in order, as lm-eval's tasks expect them.

    Raises:
        InputError: a missing file, a wrong number of cells, a missing column, an answer that is not A to D; names the
            file and the line the row begins on.
    """
    return _READERS[form](path, subject)


def _read_mmlu(path: Path, subject: str) -> list[Doc]:
    docs = []
    for line, row in _rows(path):
        if len(row) != len(_COLUMNS):
            raise InputError(
                f"{path}, line {line}: {len(row)} cells, expected {len(_COLUMNS)} ({', '.join(_COLUMNS)})",
                hint="a cell that holds a comma, a quote or a line break must be quoted",
            )
        hint = "MMLU's published files have no header line" if row[5].strip() == "answer" else None
        answer = _letter(path, line, row[5], hint)
        docs.append({"question": row[0], "subject": subject, "choices": row[1:5], "answer": LETTERS.index(answer)})
    return docs


def _read_ceval(path: Path, subject: str) -> list[Doc]:
    rows = _rows(path)
    line, header = next(rows, (1, []))
    if absent := [c for c in _COLUMNS if c not in header]:
        raise InputError(
            f"{path}, line {line}: the header lacks {listing(absent, 6)}; found {listing(header, 8)}",
            hint="C-Eval's published files begin with the line id,question,A,B,C,D,answer",
        )
    docs = []
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(row)} cells, expected {len(header)} ({', '.join(header)})",
                hint="a cell that holds a comma, a quote or a line break must be quoted",
            )
        doc = dict.fromkeys(_CEVAL_COLUMNS, "") | dict(zip(header, row, strict=True))
        doc["answer"] = _letter(path, line, doc["answer"], None)
        docs.append({column: doc[column] for column in _CEVAL_COLUMNS})
    return docs


def _letter(path: Path, line: int, cell: str, hint: str | None) -> str:
    answer = cell.strip()
    if answer not in LETTERS:
        raise InputError(f"{path}, line {line}: the answer is {cell!r}, expected A, B, C or D", hint=hint)
    return answer


def _rows(path: Path) -> Iterator[tuple[int, Sequence[str]]]:
    """Rows that are not blank, each with the line it begins on."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: no regular file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            line = 1
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file", hint="add the file, or leave the subject out of --subjects"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})", hint="save the file as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file ({error})") from error


_READERS: Mapping[str, Callable[[Path, str], list[Doc]]] = {"mmlu": _read_mmlu, "ceval": _read_ceval}
