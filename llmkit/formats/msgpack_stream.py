"""EasyLM's streaming checkpoints: msgpack objects [path of keys, bytes] one after another; the bytes are an array.

An array is, again in msgpack, an extension of type 1 that holds [shape, dtype name, raw bytes in C order]. Only what
such files need of msgpack is understood, and nothing is read but the heads: each array becomes a `Read` in place.

Source: young-geng/EasyLM (checkpoint.py: StreamingCheckpointer), google/flax (serialization.py), the msgpack spec.
"""

from __future__ import annotations

from pathlib import Path

from llmkit.errors import InputError
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import AGAIN, SourceFile
from llmkit.tensors.spec import DType, TensorSpec

_ARRAY_EXT = 1
_MAX_KEYS, _MAX_KEY_NBYTES, _MAX_DIMS = 32, 1024, 8
_DTYPES = {d.torch_name: d for d in (DType.F64, DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32, DType.U8)}

# Kind of object -> first byte -> bytes of the length that follows; and the first bytes that are a length themselves.
_SIZED = {
    "array": {0xDC: 2, 0xDD: 4}, "bin": {0xC4: 1, 0xC5: 2, 0xC6: 4}, "text": {0xD9: 1, 0xDA: 2},
    "ext": {0xC7: 1, 0xC8: 2, 0xC9: 4}, "integer": {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8},
}  # fmt: skip
_FIXED = {"array": (0x90, 0x9F), "text": (0xA0, 0xBF), "integer": (0x00, 0x7F)}


def looks_like(head: bytes) -> bool:
    """Whether the first bytes of a file begin a pair whose first member is a list of strings."""
    is_pair = len(head) > 3 and head[0] == 0x92 and 0x91 <= head[1] <= 0x9F
    return is_pair and (0xA1 <= head[2] <= 0xBF or head[2] == 0xD9)


def read(path: Path) -> dict[str, Lazy]:
    """The arrays of a file, named by their keys joined with dots, in stored order.

    Raises:
        InputError: truncated, malformed, or something that is no array of a known dtype.
    """
    cursor = _Cursor(path)
    tensors: dict[str, Lazy] = {}
    try:
        while cursor.position < cursor.source.nbytes:
            name, lazy = _entry(cursor)
            if name in tensors:
                raise InputError(f"{path}: key {name!r} occurs twice", hint=AGAIN)
            tensors[name] = lazy
    finally:
        cursor.source.close()
    return tensors


def _entry(cursor: _Cursor) -> tuple[str, Lazy]:
    if cursor.length("array") != 2:
        raise cursor.malformed("expected a pair of keys and bytes")
    keys = [cursor.text() for _ in range(cursor.bounded(cursor.length("array"), _MAX_KEYS))]
    name = ".".join(keys)
    end = cursor.length("bin") + cursor.position
    cursor.need(end, name)
    kind, length = cursor.extension()
    if kind != _ARRAY_EXT or cursor.position + length != end:
        raise cursor.malformed(f"{name} is no array (extension type {kind})")
    if cursor.length("array") != 3:
        raise cursor.malformed(f"{name}: an array has a shape, a dtype and bytes")
    shape = tuple(cursor.integer() for _ in range(cursor.bounded(cursor.length("array"), _MAX_DIMS)))
    stated = cursor.text()
    if stated not in _DTYPES:
        raise cursor.malformed(f"{name}: dtype {stated!r} is not supported")
    spec = TensorSpec(_DTYPES[stated], shape)
    nbytes = cursor.length("bin")
    if nbytes != spec.nbytes or cursor.position + nbytes != end:
        raise cursor.malformed(f"{name}: {spec} needs {spec.nbytes} bytes, the file has {nbytes}")
    lazy = Read(name, spec, cursor.source, cursor.position).output()
    cursor.position = end
    return name, lazy


class _Cursor:
    """Reads heads of msgpack objects one after another."""

    def __init__(self, path: Path) -> None:
        self.source = SourceFile(path)
        self.position = 0

    def malformed(self, reason: str) -> InputError:
        return InputError(f"{self.source.path}: malformed at byte {self.position}: {reason}", hint=AGAIN)

    def need(self, end: int, name: str) -> None:
        if end > self.source.nbytes:
            raise InputError(
                f"{self.source.path} is truncated: {name} should end at byte {end}, "
                f"the file ends at {self.source.nbytes}",
                hint=AGAIN,
            )

    def take(self, n: int) -> bytes:
        self.need(self.position + n, "an entry's head")
        data = self.source.read(self.position, n)
        self.position += n
        return data

    def length(self, what: str) -> int:
        """The length (or value) in the head of an object of the kind `what`."""
        first = self.take(1)[0]
        low, high = _FIXED.get(what, (1, 0))
        if low <= first <= high:
            return first - low
        size = _SIZED[what].get(first)
        if size is None:
            raise self.malformed(f"expected {what}, found byte 0x{first:02x}")
        return int.from_bytes(self.take(size), "big")

    def bounded(self, n: int, limit: int) -> int:
        if n > limit:
            raise self.malformed(f"{n} is more than {limit}")
        return n

    def integer(self) -> int:
        return self.length("integer")

    def text(self) -> str:
        n = self.bounded(self.length("text"), _MAX_KEY_NBYTES)
        try:
            return self.take(n).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed("a key that is no text") from error

    def extension(self) -> tuple[int, int]:
        """Type and length of an extension."""
        first = self.source.read(self.position, 1)[0] if self.position < self.source.nbytes else 0
        if 0xD4 <= first <= 0xD8:  # 1, 2, 4, 8 or 16 bytes
            return self.take(2)[1], 1 << (first - 0xD4)
        length = self.length("ext")
        return self.take(1)[0], length
