"""JSON from outside: read within a budget, and checked for values of the types that the reader needs.

Nothing that a file holds reaches the rest of the program unchecked: its size, the depth and number of its objects and
arrays, the digits of its numbers and its characters are bounded here, and the error is an `InputError` that names it.
What a parsed document may cost follows from its size: some thirty times its bytes in memory, and linear time.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from llmkit.errors import InputError

MAX_NBYTES = 100_000_000  # of one document; the largest published tokenizer.json has some 35 MB
MAX_DEPTH = 64  # what reads a document may recurse over it, and so may what writes it again
MAX_DIGITS = 300  # of a whole number, so that it has a float; a tokenizer's model_max_length may have 31
_CONTAINERS = frozenset((dict, list))
_CONTAINER_NBYTES = 20  # of a document for each object and array that it may have; one takes some 64 more than its text
_TO_ZEROS, _TOO_LONG = bytes.maketrans(b"123456789", b"0" * 9), b"0" * (MAX_DIGITS + 1)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
REMEDY = "copy the file from the model's source again"
"""What is hinted at where no other remedy is known."""


def read_json(
    path: Path, *, max_nbytes: int = MAX_NBYTES, what: str = "a JSON file of a checkpoint", takes_mark: bool = False
) -> Any:
    """The document in a file; `parse_json` says what is refused.

    Args:
        path: the file.
        max_nbytes: the longest that is read.
        what: such a file, for the error.
        takes_mark: a byte order mark before it is read over, as RFC 8259 allows: editors and shells put one.

    Raises:
        InputError: it cannot be read, or is no JSON within the budget.
    """
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"{path} is no regular file; expected a JSON document")
        nbytes = path.stat().st_size
        if nbytes > max_nbytes:
            raise InputError(f"{path} is {nbytes} bytes long; {what} has at most {max_nbytes}")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if takes_mark and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(
            f"{path} is in UTF-16, expected UTF-8",
            hint=f"iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > utf8.json, and give that",
        )
    return parse_json(data.removeprefix(codecs.BOM_UTF8) if takes_mark else data, str(path), max_nbytes=max_nbytes)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        InputError: it cannot be read, or holds no JSON object.
    """
    return as_object(read_json(path), str(path))


def parse_json(data: bytes | str, where: str, *, max_nbytes: int = MAX_NBYTES, is_strict: bool = False) -> Any:
    """A document whose objects have text as keys and whose values are Python's own.

    Args:
        data: the text, or its bytes in UTF-8.
        where: the file, and what in it, for the error.
        is_strict: what RFC 8259 leaves out is refused: NaN and infinities, in words or as 1e999, and a key that an
            object has twice. Else the numbers are taken, as transformers writes them, and the last value of a key.

    Raises:
        InputError: more than `max_nbytes`, no UTF-8, no JSON, nested deeper than `MAX_DEPTH`, more objects and arrays
            or digits than a checkpoint's files have, or half of a surrogate pair (which is no character).
    """
    if len(data) > max_nbytes:
        raise InputError(f"{where}: {len(data)} bytes of JSON, expected at most {max_nbytes}")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        n_containers = text.count("[") + text.count("{")
        most = max_nbytes // _CONTAINER_NBYTES
        if n_containers > most:
            raise ValueError(f"{n_containers} objects and arrays, expected at most {most}")
        strict: dict[str, Any] = {}
        if is_strict:
            strict = {"parse_constant": _no_number, "parse_float": _finite}
        if _TOO_LONG in (data if isinstance(data, bytes) else text.encode()).translate(_TO_ZEROS):
            strict["parse_int"] = _whole  # for the error; it is slow
        document = json.loads(text, **strict)
        if is_strict or n_containers > MAX_DEPTH:
            n_keys = _checked_depth(document, n_containers)
            if is_strict and text.count(":") > n_keys:  # a text has one, or a key is lost
                json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InputError(f"{where} is not valid JSON: nested deeper than {MAX_DEPTH}", hint=REMEDY) from None
    except UnicodeEncodeError:
        raise InputError(f"{where} is not valid JSON: it holds half of a surrogate pair", hint=REMEDY) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are of its kind
        raise InputError(f"{where} is not valid JSON: {error}", hint=REMEDY) from error
    return document


def parse_object(data: bytes | str, where: str, *, is_strict: bool = False) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        InputError: no JSON within the budget, or no object.
    """
    return as_object(parse_json(data, where, is_strict=is_strict), where)


def as_object(value: Any, where: str) -> dict[str, Any]:
    """A value that has to be a JSON object.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is beyond what a float holds")
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: dict[str, None] = {}
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:200]!r} occurs twice")
            seen[key] = None
    return document


def _checked_depth(document: Any, n_containers: int) -> int:
    """How many keys its objects have, which are `n_containers` at most with its arrays, none too deep in another."""
    n_keys, level = 0, [document] if type(document) in _CONTAINERS else []
    for _ in range(MAX_DEPTH):
        n_containers -= len(level)
        n_keys += sum([len(value) for value in level if type(value) is dict])
        members = (value.values() if type(value) is dict else value for value in level)
        level = [inner for inside in members for inner in inside if type(inner) in _CONTAINERS] if n_containers else []
        if not level:
            return n_keys
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
