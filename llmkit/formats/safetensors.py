"""The safetensors format: header first, eight-byte aligned data, no holes and no overlaps.

Reading checks everything the reference implementation checks (and that the data covers the file exactly); writing
lays out the same bytes as `safetensors.save_file`: dtype alignment descending, then name.

Source: https://github.com/huggingface/safetensors (README, safetensors/src/tensor.rs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.json_text import parse_object
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import AGAIN, SourceFile
from llmkit.tensors.spec import MAX_DIMS, DType, TensorSpec

MAX_HEADER_NBYTES = 100_000_000
_PLAIN = (",", ":")
_Key = tuple[str, str]  # dtype and shape as the header has them
_MOST, _NUMBERS = 2**64, "non-negative integers"
_BY_NAME = {d.name: d for d in DType}
# The reference writer sorts by its enum of dtypes, largest alignment first; equal sizes keep this order.
_RANK = {
    name: i
    for i, name in enumerate(
        ["U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
         "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]
    )
}  # fmt: skip


def looks_like(head: bytes) -> bool:
    """Whether the first nine bytes of a file can begin a safetensors file."""
    return len(head) >= 9 and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER_NBYTES and head[8:9] == b"{"


def read(path: Path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a file in stored order, and its metadata.

    Raises:
        InputError: truncated or malformed header, unknown dtype, offsets that overlap, leave holes, do not match the
            shape or do not end at the end of the file.
    """
    source = SourceFile(path)
    if source.nbytes < 8:
        raise InputError(f"{path} is {source.nbytes} bytes long, too short for a safetensors file")
    n = int.from_bytes(source.read(0, 8), "little")
    if not 2 <= n <= MAX_HEADER_NBYTES:
        raise InputError(
            f"{path}: header length {n} is not between 2 and {MAX_HEADER_NBYTES}: this is no safetensors file"
        )
    if 8 + n > source.nbytes:
        raise InputError(
            f"{path} is truncated: its header ends at byte {8 + n}, the file at byte {source.nbytes}",
            hint=AGAIN,
        )
    try:
        header = parse_object(source.read(8, n), f"{path}: the header", is_strict=True)
    finally:
        source.close()
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ of the header: expected an object of texts")
    tensors: dict[str, Lazy] = {}
    spans = []
    specs: dict[_Key, TensorSpec] = {}  # of each dtype and shape, which many have
    for name, entry in header.items():
        spec, begin, end = _entry(path, name, entry, specs)
        spans.append((begin, end, name))
        tensors[name] = Lazy(Read(name, spec, source, 8 + n + begin))
    _check_coverage(path, spans, source.nbytes - 8 - n)
    return tensors, metadata


def _entry(path: Path, name: str, entry: Any, specs: dict[_Key, TensorSpec]) -> tuple[TensorSpec, int, int]:
    try:
        begin, end = entry["data_offsets"]
        key = entry["dtype"], repr(entry["shape"])  # in which `true` and 1.0 are not 1
        spec = specs.get(key) or specs.setdefault(key, _spec(path, name, entry["dtype"], entry["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: tensor {name!r}: malformed entry in the header") from error
    if not (type(begin) is int is type(end) and 0 <= begin <= end < _MOST):
        raise InputError(f"{path}: tensor {name!r}: shape and offsets must be {_NUMBERS}, begin <= end")
    if end - begin != spec.nbytes:
        raise InputError(
            f"{path}: tensor {name!r}: {spec} needs {spec.nbytes} bytes, its offsets {begin}:{end} hold {end - begin}"
        )
    return spec, begin, end


def _spec(path: Path, name: str, dtype: Any, shape: Any) -> TensorSpec:
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(dtype, shape)
    if dtype not in _BY_NAME:
        raise InputError(f"{path}: tensor {name!r}: dtype {dtype!r} is not supported")
    if not all(type(n) is int and 0 <= n < _MOST for n in shape):
        raise InputError(f"{path}: tensor {name!r}: shape and offsets must be {_NUMBERS}, begin <= end")
    if len(shape) > MAX_DIMS:
        raise InputError(f"{path}: tensor {name!r} has {len(shape)} dimensions, expected at most {MAX_DIMS}")
    return TensorSpec(_BY_NAME[dtype], tuple(shape))


def _check_coverage(path: Path, spans: list[tuple[int, int, str]], data_nbytes: int) -> None:
    position, previous = 0, ""
    for begin, end, name in sorted(spans):
        if begin < position:
            raise InputError(f"{path}: tensors {previous!r} and {name!r} overlap at data byte {begin}")
        if begin > position:
            raise InputError(f"{path}: hole of {begin - position} bytes before tensor {name!r}")
        position, previous = end, name
    if position > data_nbytes:
        raise InputError(
            f"{path} is truncated: its header promises {position} bytes of data, the file holds {data_nbytes}",
            hint=AGAIN,
        )
    if position < data_nbytes:
        raise InputError(f"{path}: {data_nbytes - position} bytes follow the last tensor {previous!r}")


def layout(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Where everything goes in a file that holds `specs`.

    Returns:
        The header with its length prefix, the absolute byte offset of each tensor (in file order), the file size.
    """
    by_dtype: dict[DType, list[str]] = {}
    for name, spec in specs.items():
        by_dtype.setdefault(spec.dtype, []).append(name)
    entries = (
        [f'"__metadata__":{json.dumps(dict(metadata), separators=_PLAIN, ensure_ascii=False)}'] if metadata else []
    )
    starts: dict[str, int] = {}
    position = 0
    begins: dict[int, str] = {}  # of each dtype and shape
    # As json.dumps writes it, which takes ten times as long for a hundred thousand entries.
    for dtype in sorted(by_dtype, key=lambda dtype: (-dtype.bits, _RANK[dtype.name])):
        for name in sorted(by_dtype[dtype]):
            spec, start = specs[name], position
            starts[name], position = start, start + spec.nbytes
            if spec.form not in begins:
                shape = ",".join(map(str, spec.shape))
                begins[spec.form] = f'{{"dtype":"{dtype.name}","shape":[{shape}],"data_offsets":['
            entries.append(f"{encode_basestring(name)}:{begins[spec.form]}{start},{position}]}}")
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {k: base + v for k, v in starts.items()}, base + position
