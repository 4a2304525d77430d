"""PyTorch's own files (`pytorch_model.bin`, `.pt`, `.pth`), read without torch and without running what they hold.

Two layouts are read. The zip of torch >= 1.6: `<root>/data.pkl` describes the tensors, `<root>/data/<key>` are the raw
storages, stored uncompressed. And the legacy one: five pickles (magic, protocol, system, object, keys), then for each
storage its length and its bytes. Either way a tensor becomes a `Read` at an absolute offset of the file.

Source: torch/serialization.py (`_legacy_save`, `_legacy_load`, `_save`, `_load`).
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from llmkit.errors import InputError, listing
from llmkit.formats import safe_pickle
from llmkit.formats.safe_pickle import MAX_PICKLE_NBYTES, StorageRef, TensorRef
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.source import AGAIN, SourceFile
from llmkit.tensors.spec import DType, TensorSpec, format_bytes

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_NESTING = ("state_dict", "model", "module", "model_state_dict")
_MAX_NESTING = 4
_CODES, _MAX_TEXT = "W_q", 1024  # what HQQ calls the codes of a layer; its texts are dtypes and packings
_MAX_VIEW_NBYTES = 2**24  # of a view that repeats what is stored (stride 0): buffers are so, weights are not

# Where a storage lies in the file: absolute offset and bytes.
Span = tuple[int, int]


def looks_like(head: bytes) -> bool:
    """Whether the first bytes of a file can begin a zip or a binary pickle."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")


def read(path: Path) -> dict[str, Lazy]:
    """The tensors of a file by name, in stored order.

    The file may hold the mapping of names to tensors itself, or a mapping that has it under `state_dict`, `model`,
    `module` or `model_state_dict` (the first of them that is a mapping; again up to four levels deep). A mapping that
    holds a tensor is taken as it is; its values that are no tensors are ignored. Of HQQ's models (`qmodel.pt`), whose
    mapping has one for each module, the numbers and texts are tensors, too, as in its safetensors files.

    Raises:
        InputError: a pickle that would run something (named in the message), a truncated or malformed file, compressed
            or big-endian storages, a tensor that reaches beyond its storage, or no tensors at all.
    """
    source = SourceFile(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            top, spans = _read_zip(path, file) if zipped else _read_legacy(path, file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    found = _of_modules(top) or _tensor_dict(path, top)
    return {
        name: _lazy(path, source, name, value, spans) if isinstance(value, TensorRef) else value
        for name, value in found.items()
    }


def _read_zip(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, Span]]:
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, UnicodeDecodeError, NotImplementedError) as error:
        raise InputError(
            f"{path} is truncated or damaged: its zip directory cannot be read ({error})", hint=AGAIN
        ) from error
    entries = {e.filename: e for e in listed}
    if len(entries) < len(listed):
        raise InputError(f"{path} is damaged: its zip directory lists an entry twice", hint=AGAIN)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(
            f"{path} is a zip but no PyTorch checkpoint: it has {len(pickles)} data.pkl, expected 1",
            hint="where it is an archive of a model, unpack it and give the folder",
        )
    root = pickles[0].removesuffix("data.pkl")
    nbytes = path.stat().st_size
    order = entries.get(f"{root}byteorder")
    if order is not None and _entry_bytes(path, file, order, nbytes).strip() != b"little":
        raise InputError(f"{path} was saved on a big-endian machine; only little-endian files are read")
    described = _entry_bytes(path, file, entries[pickles[0]], nbytes)
    prefix = f"{root}data/"
    spans = {
        name.removeprefix(prefix): _span(path, file, entry, nbytes)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    return safe_pickle.load(BytesIO(described), str(path)), spans


def _span(path: Path, file: IO[bytes], entry: zipfile.ZipInfo, file_nbytes: int) -> Span:
    """Where a stored entry lies. The local header is read: torch pads its extra field, unlike the directory's."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise InputError(
            f"{path}: entry {entry.filename} is compressed or encrypted; PyTorch stores tensors as they are",
            hint="load the file with torch and save it again",
        )
    if not 0 <= entry.header_offset < file_nbytes:
        raise InputError(f"{path} is truncated or damaged: entry {entry.filename} lies outside the file", hint=AGAIN)
    file.seek(entry.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise InputError(
            f"{path} is damaged: no header for entry {entry.filename} at byte {entry.header_offset}", hint=AGAIN
        )
    name_nbytes, extra_nbytes = struct.unpack("<HH", local[26:30])
    start = entry.header_offset + 30 + name_nbytes + extra_nbytes
    if start + entry.file_size > file_nbytes:
        raise InputError(
            f"{path} is truncated: entry {entry.filename} ends at byte {start + entry.file_size}, "
            f"the file at byte {file_nbytes}",
            hint=AGAIN,
        )
    return start, entry.file_size


def _entry_bytes(path: Path, file: IO[bytes], entry: zipfile.ZipInfo, file_nbytes: int) -> bytes:
    start, nbytes = _span(path, file, entry, file_nbytes)
    if nbytes > MAX_PICKLE_NBYTES:
        raise InputError(f"{path}: entry {entry.filename} is {nbytes} bytes long, more than {MAX_PICKLE_NBYTES}")
    file.seek(start)
    return file.read(nbytes)


def _read_legacy(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, Span]]:
    where = str(path)
    magic = safe_pickle.load(file, where)
    if magic != _MAGIC:
        raise InputError(
            f"{path} is a pickle but no PyTorch checkpoint (it begins with a {type(magic).__name__})",
            hint="give a file written by torch.save, or a safetensors file",
        )
    protocol = safe_pickle.load(file, where)
    if protocol != _PROTOCOL:
        version = protocol if isinstance(protocol, int) and 0 <= protocol < 2**63 else f"(a {type(protocol).__name__})"
        raise InputError(f"{path}: PyTorch's protocol {version} is not supported; expected {_PROTOCOL}")
    system = safe_pickle.load(file, where)
    if isinstance(system, Mapping) and not system.get("little_endian", True):
        raise InputError(f"{path} was saved on a big-endian machine; only little-endian files are read")
    top = safe_pickle.load(file, where)
    keys = safe_pickle.load(file, where)
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise InputError(f"{path}: malformed list of storages")
    itemsizes = {ref.key: ref.dtype.itemsize if ref.dtype else 1 for ref in _storages(top)}
    spans: dict[str, Span] = {}
    position, nbytes = file.tell(), path.stat().st_size
    for key in keys:
        file.seek(position)
        head = file.read(8)
        numel = int.from_bytes(head, "little", signed=True)
        if key not in itemsizes:
            raise InputError(f"{path}: storage {key} belongs to no tensor, so its size is not known")
        end = position + 8 + numel * itemsizes[key]
        if len(head) < 8 or numel < 0 or end > nbytes:
            raise InputError(
                f"{path} is truncated: storage {key} should end at byte {end}, the file ends at {nbytes}", hint=AGAIN
            )
        spans[key] = (position + 8, numel * itemsizes[key])
        position = end
    return top, spans


def _storages(top: Any) -> list[StorageRef]:
    """Every storage below a value, in order, through containers of any depth (each visited once)."""
    storages: list[StorageRef] = []
    seen: set[int] = set()
    pending = [top]
    while pending:
        value = pending.pop()
        if isinstance(value, StorageRef):
            storages.append(value)
        elif isinstance(value, TensorRef):
            storages.append(value.storage)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
    return storages


def _tensor_dict(path: Path, top: Any) -> dict[str, TensorRef]:
    value, found = top, dict[str, TensorRef]()
    for _ in range(_MAX_NESTING):
        if not isinstance(value, dict):
            break
        tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, TensorRef)}
        # Around the model a training state may have tensors of its own: of random numbers, of the step.
        found = tensors if len(tensors) > len(found) else found
        value = next((value[k] for k in _NESTING if isinstance(value.get(k), dict)), None)
    if found:
        return found
    if isinstance(top, dict):
        keys = [(key if isinstance(key, str) else repr(key))[:80] for key in top if not isinstance(key, int)]
        raise InputError(
            f"{path} holds no tensors by name: found the keys {listing(keys) or '(none)'}; "
            f"expected tensors, or a mapping under {', '.join(_NESTING)}",
            hint="give the file of the model's weights; an optimizer's state is none",
        )
    kind = "one tensor" if isinstance(top, TensorRef) else f"a {type(top).__name__}"
    raise InputError(f"{path} holds {kind}; expected a mapping of names to tensors")


def _of_modules(top: Any) -> dict[str, TensorRef | Lazy]:
    """The parts of modules by their names, where some are HQQ's; nothing for other files."""
    if not isinstance(top, dict) or not any(isinstance(own, dict) and _CODES in own for own in top.values()):
        return {}
    found: dict[str, TensorRef | Lazy] = {}
    for module, own in top.items():
        if not isinstance(module, str) or not isinstance(own, dict):
            continue
        nested = own.get("meta")  # of its first versions
        for end, value in {**own, **(nested if isinstance(nested, dict) else {})}.items():
            part = value if isinstance(value, TensorRef) else _constant(value) if _CODES in own else None
            if isinstance(end, str) and part is not None:
                found[f"{module}.{end}"] = part
    return found


def _constant(value: Any) -> Lazy | None:
    """A number, a few, or a text as a tensor of integers; None for others."""
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        data = value.encode()
        return constant_of(list(data), DType.U8, (len(data),))
    numbers = value if isinstance(value, tuple | list) else (value,)
    if len(numbers) > _MAX_TEXT or not all(isinstance(n, int) and -(2**63) <= n < 2**63 for n in numbers):
        return None
    return constant_of([int(n) for n in numbers], DType.I64, (len(numbers),))


def _lazy(path: Path, source: SourceFile, name: str, ref: TensorRef, spans: Mapping[str, Span]) -> Lazy:
    storage, spec = ref.storage, TensorSpec(ref.dtype, ref.shape)
    if storage.key not in spans:
        raise InputError(f"{path}: tensor {name!r}: its storage {storage.key} is not in the file", hint=AGAIN)
    start, nbytes = spans[storage.key]
    stored_itemsize = storage.dtype.itemsize if storage.dtype else 1
    declared = storage.numel * stored_itemsize
    if declared > nbytes:
        raise InputError(
            f"{path}: tensor {name!r}: storage {storage.key} should hold {declared} bytes, found {nbytes}", hint=AGAIN
        )
    first = storage.start * stored_itemsize + ref.offset * ref.dtype.itemsize
    reach = 1 + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True)) if spec.numel else 0
    if first + reach * ref.dtype.itemsize > declared:
        raise InputError(
            f"{path}: tensor {name!r}: {spec} at offset {ref.offset} reaches beyond its storage of {declared} bytes"
        )
    if spec.nbytes > max(declared, _MAX_VIEW_NBYTES):
        raise InputError(
            f"{path}: tensor {name!r}: {spec} is a view that repeats its {format_bytes(declared)} of storage; "
            f"strides {list(ref.strides)}",
            hint="save it with torch as tensor.contiguous()",
        )
    ordered = zip(ref.shape, ref.strides, spec.strides, strict=True)
    is_contiguous = not spec.numel or all(n == 1 or stride == expected for n, stride, expected in ordered)
    return Read(name, spec, source, start + first, None if is_contiguous else ref.strides).output()
