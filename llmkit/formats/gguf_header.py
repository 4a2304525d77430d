"""GGUF headers, read and written without the gguf library.

`gguf.GGUFReader` makes several numpy objects of every string: 2.3 s for a vocabulary of 49,000 tokens. And it trusts
counts, lengths and offsets. Here everything is checked against the size of the file before it is believed.

Layout, little-endian: `GGUF`, u32 version, u64 tensors, u64 pairs; each pair a string key, a u32 type and a value; each
tensor a name, u32 n, n u64 sizes (the innermost first), u32 type, u64 offset into the data, which begins at the next
multiple of `general.alignment`. Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.gguf_metadata import check_types
from llmkit.formats.gguf_types import TYPES, GgufType
from llmkit.tensors.source import AGAIN, SourceFile

MAGIC = b"GGUF"
ALIGNMENT = 32
_VERSIONS = (2, 3)  # 3 differs from 2 only in that it may be big-endian
_MAX_NAME = 1024
_MAX_TENSORS = 2**20
_MAX_NBYTES = 100_000_000  # of a header; a sparse file has gigabytes of it on no disk
_WINDOW_NBYTES = 2**20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _I32, _F32, _BOOL = 4, 5, 6, 7


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        shape: outermost first, as torch has it.
        offset: absolute, in bytes.
    """

    name: str
    type: GgufType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.type.tensor_nbytes(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What the header of a file says.

    Attributes:
        metadata: key -> number, boolean, string, or list of them.
        tensors: in file order.
    """

    source: SourceFile
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path) -> GgufFile:
    """Read and check the header of one file.

    Raises:
        InputError: not GGUF, a version or byte order that is not read, truncated, or a header that contradicts itself.
    """
    source = SourceFile(path)
    cursor = _Cursor(source)
    try:
        if source.nbytes < 4 or cursor.take(4) != MAGIC:
            raise InputError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()!r}", hint=AGAIN)
        version = cursor.scalar("I")
        _check_version(path, version)
        n_tensors, n_pairs = cursor.scalar("Q"), cursor.scalar("Q")
        cursor.check_count(n_tensors, 24, "tensors", _MAX_TENSORS)
        cursor.check_count(n_pairs, 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = cursor.string("a metadata key", _MAX_NAME)
            if key in metadata:
                raise InputError(f"{path}: malformed header: metadata key {key!r} comes twice")
            metadata[key] = cursor.value(cursor.scalar("I"), key)
        check_types(path, metadata)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{path}: malformed header: general.alignment is {alignment!r}, expected a power of two")
        infos = [_tensor_info(cursor) for _ in range(n_tensors)]
        start = -(-cursor.position // alignment) * alignment
    finally:
        source.close()
    tensors = tuple(GgufTensor(name, kind, shape, start + offset) for name, kind, shape, offset in infos)
    _check_tensors(path, tensors, start, alignment, source.nbytes)
    return GgufFile(source, version, metadata, tensors)


def _check_version(path: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    if version.bit_count() and not version & 0xFFFF:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise InputError(
            f"{path} is a big-endian GGUF file (version {swapped}); only little-endian ones are read",
            hint="convert it where it was made: gguf-convert-endian FILE little",
        )
    raise InputError(
        f"{path} is GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read",
        hint="convert the original checkpoint again with a current converter",
    )


def _tensor_info(cursor: _Cursor) -> tuple[str, GgufType, tuple[int, ...], int]:
    path = cursor.path
    name = cursor.string("a tensor name", _MAX_NAME)
    n_dims = cursor.scalar("I")
    if n_dims > 4:
        raise InputError(f"{path}: malformed header: {name} has {n_dims} dimensions, expected at most 4")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(n_dims)]))
    code, offset = cursor.scalar("I"), cursor.scalar("Q")
    kind = TYPES.get(code)
    if kind is None:
        raise InputError(f"{path}: {name} is of ggml type {code}, which is not known")
    if any(n < 1 or n >= 2**48 for n in shape) or (shape and shape[-1] % kind.block):
        raise InputError(f"{path}: malformed header: {name} has shape {list(shape)}, which {kind.name} cannot store")
    return name, kind, shape, offset


def _check_tensors(path: Path, tensors: Iterable[GgufTensor], start: int, alignment: int, nbytes: int) -> None:
    end, last, seen = start, "", set()
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.name in seen:
            raise InputError(f"{path}: malformed header: tensor {tensor.name!r} comes twice")
        seen.add(tensor.name)
        if tensor.offset % alignment:
            raise InputError(f"{path}: malformed header: {tensor.name} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise InputError(f"{path}: malformed header: the data of {tensor.name} overlaps that of {last}")
        end, last = tensor.offset + tensor.nbytes, tensor.name
        if end > nbytes:
            raise InputError(
                f"{path} is truncated: {tensor.name} ends at byte {end}, the file at byte {nbytes}",
                hint=AGAIN,
            )


class _Cursor:
    """Reads a header piece by piece from a window of the file that moves on."""

    def __init__(self, source: SourceFile) -> None:
        self.path = source.path
        self._source = source
        self._window = b""
        self._start = 0  # of the window in the file
        self._at = 0  # in the window

    @property
    def position(self) -> int:
        return self._start + self._at

    def _need(self, n: int) -> int:
        """Make `n` bytes available; the place in the window where they begin."""
        if self._at + n > len(self._window):
            position, size = self.position, self._source.nbytes
            if position + n > size:
                raise InputError(
                    f"{self.path} is truncated: its header goes on beyond byte {size}, where the file ends",
                    hint=AGAIN,
                )
            if position + n > _MAX_NBYTES:
                raise InputError(f"{self.path}: malformed header: longer than {_MAX_NBYTES} bytes")
            self._window = self._source.read(position, min(max(n, _WINDOW_NBYTES), size - position))
            self._start, self._at = position, 0
        at = self._at
        self._at += n
        return at

    def take(self, n: int) -> bytes:
        at = self._need(n)
        return self._window[at : at + n]

    def scalar(self, code: str) -> Any:
        at = self._need(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self._window, at)[0]

    def check_count(self, n: int, nbytes: int, what: str, most: int = _MAX_NBYTES) -> None:
        """Refuse a count of things of at least `nbytes` each that is no model's, or has no room in the file's rest."""
        left = self._source.nbytes - self.position
        if n * nbytes > left:
            raise InputError(
                f"{self.path} is truncated or damaged: {n} {what} do not fit into the {left} bytes that are left",
                hint=AGAIN,
            )
        if n > most or self.position + n * nbytes > _MAX_NBYTES:
            raise InputError(f"{self.path}: malformed header: {n} {what}, more than a model has")

    def string(self, what: str, limit: int | None = None) -> str:
        n = self.scalar("Q")
        self.check_count(n, 1, f"bytes of {what}")
        if limit is not None and n > limit:
            raise InputError(f"{self.path}: malformed header: {what} is {n} bytes long, expected at most {limit}")
        return self.take(n).decode("utf-8", "replace")

    def value(self, code: int, key: str) -> Any:
        if code == _STRING:
            return self.string(key)
        if code != _ARRAY:
            if code not in _SCALARS:
                raise InputError(f"{self.path}: malformed header: {key} is of type {code}, which is not known")
            return self.scalar(_SCALARS[code])
        of, n = self.scalar("I"), self.scalar("Q")
        if of == _STRING:
            self.check_count(n, 8, f"strings of {key}")
            return self._strings(n, key)
        if of not in _SCALARS:
            raise InputError(f"{self.path}: malformed header: {key} is an array of type {of}, which is not read")
        size = struct.calcsize(_SCALARS[of])
        self.check_count(n, size, f"values of {key}")
        at = self._need(n * size)
        return list(struct.unpack_from(f"<{n}{_SCALARS[of]}", self._window, at))

    def _strings(self, n: int, key: str) -> list[str]:
        """A vocabulary: the same as `string` n times, without a call for each."""
        strings: list[str] = []
        length = struct.Struct("<Q").unpack_from
        while len(strings) < n:
            strings.append(self.string(key))  # moves the window on where it ends
            window, at = self._window, self._at
            limit = len(window) - 8
            for _ in range(n - len(strings)):
                if at > limit:
                    break
                end = at + 8 + length(window, at)[0]
                if end > len(window):
                    break
                strings.append(window[at + 8 : end].decode("utf-8", "replace"))
                at = end
            self._at = at
        return strings


def encode_header(
    metadata: Mapping[str, Any], tensors: Iterable[tuple[str, GgufType, tuple[int, ...]]]
) -> tuple[bytes, dict[str, int], int]:
    """The bytes up to the data, the absolute offset of each tensor, and the size of the file.

    Args:
        metadata: booleans, strings, numbers (an int becomes u32, a float f32) and lists of them (of ints: i32).
        tensors: name, type and shape, outermost first.
    """
    tensors = list(tensors)
    infos, offset, offsets = [], 0, {}
    for name, kind, shape in tensors:
        infos += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.code, offset)]
        offsets[name] = offset
        offset += -(-kind.tensor_nbytes(shape) // ALIGNMENT) * ALIGNMENT
    pairs = [_text(key) + _pair(key, value) for key, value in metadata.items()]
    body = b"".join([MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata)), *pairs, *infos])
    body += b"\0" * (-len(body) % ALIGNMENT)
    return body, {name: len(body) + at for name, at in offsets.items()}, len(body) + offset


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, value: Any) -> bytes:
    try:
        return _encoded(value)
    except (OverflowError, struct.error) as error:
        raise InputError(
            f"{key} is {str(value)[:60]}, which no 32 bits of a GGUF hold", hint="correct it in config.json"
        ) from error


def _encoded(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list | tuple):
        first = value[0] if value else ""
        if isinstance(first, str):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
        of = _BOOL if isinstance(first, bool) else _I32 if isinstance(first, int) else _F32
        return struct.pack(f"<IIQ{len(value)}{_SCALARS[of]}", _ARRAY, of, len(value), *value)
    of = _BOOL if isinstance(value, bool) else _U32 if isinstance(value, int) else _F32
    return struct.pack(f"<I{_SCALARS[of]}", of, value)
