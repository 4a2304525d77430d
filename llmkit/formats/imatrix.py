"""llama.cpp's importance matrices: for each matrix the sum of x^2 of each input channel, in both generations of files.

Since 2025 a GGUF with `general.type` "imatrix": for each matrix two float32 tensors, `NAME.in_sum2` [matrices, in] and
`NAME.counts` [matrices, 1] (several matrices where NAME is a stack of experts); `NAME.in_sum`, which newer versions
add, is not needed. Before that a binary of little-endian int32 and float32:

    entries, then for each: length, name, calls, values, the values (the mean of x^2, times calls)
    and, in all but the first versions: chunks, length, name of the text

In both the mean of x^2 is sum / count.

Source: ggml-org/llama.cpp, tools/imatrix/imatrix.cpp (`save_imatrix`, `save_imatrix_legacy`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmkit.errors import InputError
from llmkit.formats.gguf_container import GgufContainer
from llmkit.formats.gguf_header import MAGIC, GgufFile, GgufTensor, read_header
from llmkit.formats.stream import StreamFile
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import AGAIN, SourceFile
from llmkit.tensors.spec import DType, TensorSpec

_TYPE = "imatrix"
SUMS, COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 1024


def looks_binary(head: bytes) -> bool:
    """Whether the first bytes of a file can begin an importance matrix of the older generation."""
    if len(head) < 9:
        return False
    n_entries, n_name = struct.unpack("<2i", head[:8])
    name = head[8 : 8 + n_name] if n_entries > 0 and 0 < n_name <= _MAX_NAME else b""
    return len(name) == n_name and name.isascii() and name.endswith(b".weight")


@dataclass(frozen=True)
class Entry:
    """What is known of the inputs of one tensor.

    Attributes:
        sums: float32 [matrices, in], the sum of x^2 of each channel.
        counts: by how many each row is to be divided for the mean; 0 where no input reached the matrix.
    """

    sums: Lazy
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Imatrix:
    """A whole file.

    Attributes:
        entries: by the name of the tensor in GGUF files.
        datasets: names of the texts.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = field(default=())


def looks_like_binary(head: bytes) -> bool:
    """Whether the first bytes of a file can begin the older generation: counts, then a name that ends in `.weight`."""
    if len(head) < 8:
        return False
    n_entries, length = struct.unpack_from("<ii", head)
    return n_entries > 0 and 0 < length <= _MAX_NAME and head[8 : 8 + length].endswith(b".weight")


def read(path: Path) -> Imatrix:
    """An importance matrix of either generation.

    Raises:
        InputError: it is none, truncated, or malformed.
    """
    source = SourceFile(path)
    head = source.read(0, min(source.nbytes, 8 + _MAX_NAME))
    if head.startswith(MAGIC):
        source.close()
        return _from_gguf(read_header(path))
    if not looks_like_binary(head):
        source.close()
        raise InputError(
            f"{path} is no importance matrix of llama.cpp: expected a GGUF, or the binary before it",
            hint="llmkit quantize observe MODEL -o FILE, or llama.cpp's llama-imatrix, writes one",
        )
    try:
        return _from_binary(source)
    finally:
        source.close()


def _from_gguf(file: GgufFile) -> Imatrix:
    path = file.source.path
    if file.metadata.get("general.type") != _TYPE:
        raise InputError(f"{path} is a GGUF of a model; expected one of an importance matrix (general.type imatrix)")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    entries = {}
    for name, sums in tensors.items():
        stem = name.removesuffix(SUMS)
        if stem == name:
            continue
        counts = tensors.get(stem + COUNTS)
        if counts is None or {sums.type.name, counts.type.name} != {"F32"} or len(sums.shape) > 2:
            raise InputError(f"{path}: {name} and {stem}{COUNTS} must be float32 matrices", hint=AGAIN)
        n_matrices = math.prod(sums.shape[:-1])
        if math.prod(counts.shape) != n_matrices:
            raise InputError(f"{path}: {stem} has {n_matrices} matrices and {math.prod(counts.shape)} counts")
        numbers = _floats(file, counts, n_matrices)
        if any(not math.isfinite(n) or n < 0 for n in numbers):
            raise InputError(f"{path}: {stem}{COUNTS} holds numbers that are no counts", hint=AGAIN)
        spec = TensorSpec(DType.F32, (n_matrices, sums.shape[-1]))
        entries[stem] = Entry(Read(name, spec, file.source, sums.offset).output(), numbers)
    if not entries:
        raise InputError(f"{path} holds no importance of any tensor")
    datasets = file.metadata.get("imatrix.datasets", [])
    return Imatrix(entries, tuple(map(str, datasets)) if isinstance(datasets, list) else ())


def _floats(file: GgufFile, tensor: GgufTensor, n: int) -> tuple[float, ...]:
    return struct.unpack(f"<{n}f", file.source.read(tensor.offset, 4 * n))


def _from_binary(source: SourceFile) -> Imatrix:
    path, position = source.path, 4

    def integer(what: str, least: int, most: int) -> int:
        nonlocal position
        if position + 4 > source.nbytes:
            raise InputError(f"{path} is truncated at byte {position}", hint=AGAIN)
        (number,) = struct.unpack("<i", source.read(position, 4))
        position += 4
        if not least <= number <= most:
            raise InputError(f"{path}: {what} is {number}, expected {least} to {most}", hint=AGAIN)
        return int(number)

    def text(what: str, most: int) -> str:
        nonlocal position
        length = integer(f"the length of {what}", 0, min(most, source.nbytes - position))
        position += length
        return source.read(position - length, length).decode("utf-8", "replace")

    (n_entries,) = struct.unpack("<i", source.read(0, 4))
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        name = text("a name", _MAX_NAME)
        if name in entries:
            raise InputError(f"{path}: {name} comes twice", hint=AGAIN)
        n_calls = integer(f"the count of {name}", 0, 2**31 - 1)
        n_values = integer(f"the number of values of {name}", 1, (source.nbytes - position) // 4)
        spec = TensorSpec(DType.F32, (1, n_values))
        # As llama-quantize reads it: values of no call are the means themselves.
        entries[name] = Entry(Read(name, spec, source, position).output(), (float(max(n_calls, 1)),))
        position += 4 * n_values
    if position == source.nbytes:
        return Imatrix(entries)
    integer("the number of chunks", 0, 2**31 - 1)
    dataset = text("the name of the text", source.nbytes)
    return Imatrix(entries, (dataset,) if dataset else ())


def gguf_container(
    name: str, channels: Mapping[str, int], dataset: str, *, n_samples: int, length: int
) -> GgufContainer:
    """A file of the newer generation, for float32 tensors `NAME.in_sum2` [1, in] and `NAME.counts` [1, 1].

    Args:
        name: of the file.
        channels: inputs of each tensor, by its name in GGUF files.
        dataset: name of the text.
        n_samples, length: how many were seen, and the tokens of each.
    """
    metadata = {
        "general.type": _TYPE, "imatrix.datasets": [dataset], "imatrix.chunk_count": n_samples,
        "imatrix.chunk_size": length,
    }  # fmt: skip
    return GgufContainer(name, metadata, {part + end: "F32" for part in sorted(channels) for end in (SUMS, COUNTS)})


def binary_container(name: str, channels: Mapping[str, int], dataset: str, *, n_samples: int) -> StreamFile:
    """A file of the older generation, for float32 tensors NAME [in]: the mean of x^2, times `n_samples`."""
    parts: list[bytes | str] = [struct.pack("<i", len(channels))]
    for part in sorted(channels):
        head = struct.pack("<i", len(part.encode())) + part.encode()
        parts += [head + struct.pack("<ii", n_samples, channels[part]), part]
    last = dataset.encode()
    return StreamFile(name, [*parts, struct.pack("<ii", n_samples, len(last)) + last])
