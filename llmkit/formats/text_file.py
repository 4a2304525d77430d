"""Text from outside: a file, or what a pipe hands over, as UTF-8."""

from __future__ import annotations

import os
import re
import select
import shlex
import stat
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.paths import expanded

_PIPE_NBYTES = 1 << 30  # of what comes from a pipe, whose length is unknown
_SPARSE_NBYTES = 1 << 26  # beyond it a file has to lie on the disk, where one that is compressed has a tenth of it
_HINT = "give a text file in UTF-8"
_GB_LETTERS = re.compile(rb"[\xa1-\xfe]{2}")
_YAML_NBYTES = 1_000_000  # a description of sizes; the parser is slow, and recurses
_YAML_DEPTH = 32
_YAML_ALIASES = 16  # each pair may double what a reader sees


def read_text(path: Path, *, hint: str | None = _HINT, max_nbytes: int | None = None) -> str:
    """The text of a regular file, or of a pipe that somebody writes to (`<(zcat …)`); a byte order mark is left out.

    Budget: the memory of the file twice; of a pipe a gigabyte.

    Raises:
        InputError: no such file, a device, a pipe without a writer, too much, or no UTF-8.
    """
    try:
        fd = os.open(expanded(path), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(fd, "rb", buffering=0) as file:
            status = os.fstat(fd)
            mode, nbytes = status.st_mode, status.st_size
            if max_nbytes is not None and nbytes > max_nbytes:
                raise InputError(f"{path} is {nbytes} bytes long, expected at most {max_nbytes}", hint=hint)
            if nbytes > _SPARSE_NBYTES and 512 * getattr(status, "st_blocks", nbytes) < nbytes // 100:
                raise InputError(f"{path} is {nbytes} bytes long, next to none of them on the disk: no text", hint=hint)
            if stat.S_ISREG(mode):
                data = file.readall()
            elif stat.S_ISFIFO(mode):
                data = _piped(path, fd, hint)
            else:
                kind = "a folder" if stat.S_ISDIR(mode) else "a device or socket"
                raise InputError(f"cannot read {path}: it is {kind}, expected a text file", hint=hint)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", hint=hint) from error
    return decoded(data, str(path), hint=hint)


def decoded(data: bytes, where: str, *, hint: str | None = _HINT) -> str:
    """Bytes as the text that they are in UTF-8.

    Raises:
        InputError: they are no UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = utf16_of(data) or ("GB18030" if is_gb18030(data) else None)
        if encoding is not None:
            raise InputError(
                f"{where} is in {encoding}, expected UTF-8",
                hint=f"iconv -f {encoding} -t UTF-8 {shlex.quote(where)} > utf8.txt, and give that",
            ) from error
        raise InputError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}", hint=hint) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python's text files do


def utf16_of(data: bytes) -> str | None:
    """UTF-16 by its mark, or by the NUL bytes that ASCII has in it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    even, odd = data[:4096:2].count(0), data[1:4096:2].count(0)
    if max(even, odd) < max(4, 8 * min(even, odd), len(data[:4096]) // 40):
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def is_gb18030(data: bytes) -> bool:
    """Whether it decodes, and its bytes beyond ASCII are pairs, as Chinese letters are and accents are not."""
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return False
    beyond = sum(byte >= 0x80 for byte in data)
    return 2 * len(_GB_LETTERS.findall(data)) > 0.7 * beyond


def read_yaml(path: Path, *, once: bool = False) -> object:
    """The document of a small YAML file.

    Args:
        once: refuse a key that stands twice in a mapping, of which YAML's readers take the last.

    Raises:
        InputError: too large, no YAML, nested too deep, or with more aliases than writers make.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value if once else ():
                if str(key.value) in seen:
                    line = key.start_mark.line + 1
                    raise InputError(f"{path}, line {line}: {key.value!r:.80} stands there twice", hint="leave one out")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    text = read_text(path, max_nbytes=_YAML_NBYTES)
    try:
        depth = n_aliases = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.events.CollectionStartEvent)
            depth -= isinstance(event, yaml.events.CollectionEndEvent)
            n_aliases += isinstance(event, yaml.events.AliasEvent)
            if depth > _YAML_DEPTH or n_aliases > _YAML_ALIASES:
                raise InputError(f"{path}: YAML nested deeper than {_YAML_DEPTH}, or with over {_YAML_ALIASES} aliases")
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = getattr(error, "problem", None) or (str(error) or type(error).__name__).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark is not None else path
        raise InputError(f"{where} is not YAML: {first[:200]}") from error


def _piped(path: Path, fd: int, hint: str | None) -> bytes:
    pieces: list[bytes] = []
    nbytes = 0
    while nbytes <= _PIPE_NBYTES:
        try:
            piece = os.read(fd, 1 << 20)
        except BlockingIOError:
            select.select([fd], [], [])
            continue
        if not piece:
            if not pieces:
                raise InputError(f"{path} is a pipe that nobody writes to", hint=hint)
            return b"".join(pieces)
        pieces.append(piece)
        nbytes += len(piece)
    raise InputError(f"{path}: more than {_PIPE_NBYTES} bytes come from the pipe", hint="write them to a file first")
