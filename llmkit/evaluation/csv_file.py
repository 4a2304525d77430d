"""One CSV file of a benchmark, from bytes to rows of text: what is no such file is refused by its name.

Cells are text and stay text: `0.50` stays `0.50` and `None` stays `None`, which number-guessing readers change.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from shlex import quote

from llmkit.errors import InputError
from llmkit.formats.text_file import is_gb18030, utf16_of

_HTML = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_MAGIC = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"PAR1": "a Parquet file"}


@dataclass(frozen=True, slots=True)
class Row:
    """Cells, and where the row begins: `line 3`; the first line is 1."""

    place: str
    cells: list[str]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file in UTF-8 that are not blank.

    Raises:
        InputError: no such file, another encoding (GB18030 and UTF-16 by name), a NUL byte, an archive, a Git LFS
            pointer, an HTML page, a quote that is never closed.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: no regular file")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file", hint="add the file, or leave the subject out of --subjects"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    refuse_other_kinds(path, data)
    return list(_split(path, _decode(path, data)))


def refuse_other_kinds(path: Path, data: bytes, but: bytes = b"") -> None:
    """Refuse what begins as no table of questions does: archives, pointers, pages; `but` is the wanted beginning.

    Raises:
        InputError: names the kind.
    """
    for magic, kind in _MAGIC.items():
        if data.startswith(magic) and magic != but:
            raise InputError(
                f"{path}: {kind}, not {'a Parquet' if but else 'a CSV'} file",
                hint="unpack it, or download the CSV files themselves",
            )
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself", hint=f"git -C {quote(str(path.parent))} lfs pull"
        )
    if _HTML.match(data[:256]):
        raise InputError(
            f"{path}: an HTML page saved as {path.suffix}",
            hint="download the file itself: the page's raw link, or the published archive",
        )


def _decode(path: Path, data: bytes) -> str:
    if encoding := utf16_of(data):
        raise InputError(f"{path}: the file is in {encoding}, expected UTF-8", hint=_conversion(path, encoding))
    if (nul := data.find(0)) >= 0:
        raise InputError(f"{path}, {_place(data, nul)}: a NUL byte", hint="the file is damaged: download it again")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if is_gb18030(data):
            raise InputError(
                f"{path}: the file is in GB18030 (or GBK, a part of it), expected UTF-8",
                hint=_conversion(path, "GB18030"),
            ) from error
        raise InputError(
            f"{path}, {_place(data, error.start)}: not UTF-8 (0x{data[error.start]:02x})", hint="save the file as UTF-8"
        ) from error


def _conversion(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {quote(str(path))} > utf8.csv && mv utf8.csv {quote(str(path))}"


def _place(data: bytes, at: int) -> str:
    before = data[:at].split(b"\n")
    return f"line {len(before)}, byte {len(before[-1]) + 1}"


def _split(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 else, which a question may be longer than
    reader = csv.reader(StringIO(text, newline=""))
    line = 1
    last: int | None = None
    try:
        for cells in reader:
            if cells:
                last = line
                yield Row(f"line {line}", cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV ({error})", hint="a quote that is never closed?") from error
    if last is not None and _is_open(text, last):
        raise InputError(f"{path}, line {last}: a quote that is opened in this row is never closed")


def _is_open(text: str, line: int) -> bool:
    """Whether the last row, which begins on `line`, ends inside quotes."""
    lines = StringIO(text, newline="")
    for _ in range(line - 1):
        lines.readline()
    try:
        list(csv.reader(lines, strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False
