"""PyTorch's zip files, written without torch and without holding a tensor: `pytorch_model.bin`, `consolidated.00.pth`.

A file is a zip of stored entries under one folder: `data.pkl` (a pickle, protocol 2, that rebuilds a dictionary of
tensors over storages), `byteorder`, `data/0`, `data/1`, … (the raw storages, one a tensor, each at a multiple of 64
bytes so that it can be mapped), and `version`. The sizes of all headers are known from names and shapes, so the data
has its offsets at once; the CRC-32 of each storage comes last, into its local header and the directory at the end.

Source: torch/serialization.py (`_save`), caffe2/serialize/inline_container.cc (alignment), PKWARE's APPNOTE 4.3 to 4.5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmkit.errors import SpecError
from llmkit.formats.container import Chunks, OutputFile, OutputFiles, index_json, must_cover, shard, shard_names
from llmkit.formats.safe_pickle import STORAGES
from llmkit.tensors.spec import TensorSpec

_ALIGNMENT = 64
_ROOT = "archive"  # torch finds the folder by the first entry; a fixed name keeps a renamed file readable everywhere
_LIMIT = 0xFFFFFFFF
_DATE = 0x21  # 1 January 1980, the first day a zip can say: the same bytes whenever it is written
_STORAGES = {dtype: name for name, dtype in STORAGES.items()}


@dataclass(frozen=True, slots=True)
class TorchFiles:
    """Shards of torch's zip, with the index that transformers reads.

    Attributes:
        name: the file's name when one holds all.
    """

    name: str = "pytorch_model.bin"

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        shards = shard(specs, max_nbytes)
        names = shard_names(self.name, len(shards))
        files = [_file(n, {t: t for t in held}, held) for n, held in zip(names, shards, strict=True)]
        return OutputFiles(tuple(files), index_json(self.name, files, specs))


@dataclass(frozen=True, slots=True)
class TorchNamedFiles:
    """Files of torch's zip whose tensors are given: the same name may stand in several of them.

    Attributes:
        files: file name -> (name in the checkpoint, name in the file) of each tensor, in order.
    """

    files: Mapping[str, Sequence[tuple[str, str]]]

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        must_cover(specs, (key for held in self.files.values() for key, _ in held), " and ".join(self.files))
        return OutputFiles(tuple(_file(name, dict(held), specs) for name, held in self.files.items()))


def _file(name: str, stored: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> OutputFile:
    held = {key: specs[key] for key in stored}
    entries: list[_Entry] = []
    position = 0
    head = {f"{_ROOT}/data.pkl": _pickled([(stored[key], spec) for key, spec in held.items()])}
    head[f"{_ROOT}/byteorder"] = b"little"
    for path, data in head.items():
        entries.append(_Entry(path, position, len(data), zlib.crc32(data), data))
        position = entries[-1].end
    offsets = {}
    for i, (key, spec) in enumerate(held.items()):
        entries.append(_Entry(f"{_ROOT}/data/{i}", position, spec.nbytes, key=key))
        offsets[key] = entries[-1].start
        position = entries[-1].end
    version = b"3\n"
    entries.append(_Entry(f"{_ROOT}/version", position, len(version), zlib.crc32(version), version))
    position = entries[-1].end
    fixed = [(e.position, e.local_header(e.crc) + e.data) for e in entries]
    directory = _directory(entries, position, {})

    def finish(crcs: Mapping[str, int]) -> Chunks:
        chunks = [(e.position + 14, struct.pack("<I", crcs[e.key])) for e in entries if e.key is not None]
        return [*chunks, (position, _directory(entries, position, crcs))]

    names = {key: inner for key, inner in stored.items() if key != inner}
    return OutputFile(name, position + len(directory), offsets, tuple(fixed), finish, names)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One stored entry, whose local header begins at `position`; `key` names the tensor that is its data."""

    path: str
    position: int
    nbytes: int
    crc: int = 0
    data: bytes = b""
    key: str | None = None

    @property
    def start(self) -> int:
        """Where its data begins: the next multiple of 64 after a header with room for its padding's own."""
        bare = self.position + 30 + len(self.path) + len(self._zip64()) + 4
        return -(-bare // _ALIGNMENT) * _ALIGNMENT

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def _zip64(self) -> bytes:
        return struct.pack("<HHQQ", 1, 16, self.nbytes, self.nbytes) if self.nbytes >= _LIMIT else b""

    def local_header(self, crc: int) -> bytes:
        """The header before the data, padded by an extra field (`FB`, as torch pads) so that the data is aligned."""
        zip64 = self._zip64()
        n_padding = self.start - self.position - 30 - len(self.path) - len(zip64) - 4
        extra = zip64 + b"FB" + struct.pack("<H", n_padding) + b"Z" * n_padding
        size = min(self.nbytes, _LIMIT)
        fields = (0x04034B50, 45 if zip64 else 20, 0, 0, 0, _DATE, crc, size, size, len(self.path), len(extra))
        return struct.pack("<IHHHHHIIIHH", *fields) + self.path.encode() + extra

    def directory_entry(self, crc: int) -> bytes:
        big = [n for n in (self.nbytes, self.nbytes, self.position) if n >= _LIMIT]
        extra = struct.pack(f"<HH{len(big)}Q", 1, 8 * len(big), *big) if big else b""
        need = 45 if big else 20
        size, position = min(self.nbytes, _LIMIT), min(self.position, _LIMIT)
        head = (0x02014B50, need, need, 0, 0, 0, _DATE, crc, size, size)
        fields = (*head, len(self.path), len(extra), 0, 0, 0, 0, position)
        return struct.pack("<IHHHHHHIIIHHHHHII", *fields) + self.path.encode() + extra


def _directory(entries: Sequence[_Entry], position: int, crcs: Mapping[str, int]) -> bytes:
    """The central directory at `position` and the records that end the file; as long for any CRCs."""
    listed = b"".join(e.directory_entry(e.crc if e.key is None else crcs.get(e.key, 0)) for e in entries)
    n, size = len(entries), len(listed)
    tail = b""
    if n >= 0xFFFF or position >= _LIMIT or size >= _LIMIT:
        tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, n, n, size, position)
        tail += struct.pack("<IIQI", 0x07064B50, 0, position + size, 1)
    few = min(n, 0xFFFF)
    return (
        listed
        + tail
        + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, min(size, _LIMIT), min(position, _LIMIT), 0)
    )


def _pickled(tensors: Iterable[tuple[str, TensorSpec]]) -> bytes:
    """`OrderedDict` of names to `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, protocol 2.

    Written opcode by opcode: what it names (torch's functions and storage classes) is not imported here.
    """
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    out = [b"\x80\x02", ordered_dict, b"("]
    for i, (name, spec) in enumerate(tensors):
        kind = _STORAGES.get(spec.dtype)
        if kind is None:
            raise SpecError(
                f"{name} is {spec.dtype.name}, which a torch file's storages do not know", hint="convert with --to hf"
            )
        storage = _text("storage") + f"ctorch\n{kind}\n".encode() + _text(str(i)) + _text("cpu")
        out += [
            _text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(" + storage + _int(spec.numel) + b"tQ", _int(0),
            _ints(spec.shape), _ints(spec.strides), b"\x89", ordered_dict, b"tR",
        ]  # fmt: skip
    return b"".join([*out, b"u."])


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(n: int) -> bytes:
    if n < 2**31:
        return b"J" + struct.pack("<i", n)
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _ints(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
