"""Pickles that describe tensors, read as data: nothing of what they name is imported or called.

The unpickler is the interpreter of the standard library with five bolts. Every global is looked up in a table of
inert stand-ins, and anything else is refused by name; opcodes that build objects in other ways, or that allocate what
a length field says before reading it, are taken out; the stream is bounded in bytes and in opcodes, each of which
makes at most one small object; keys of dicts are text or numbers, or a short tuple of them, for hashing a tuple walks
all that it holds; and attributes that a pickle sets on a container are dropped. What comes back is plain containers
whose tensors are `TensorRef`: a storage, an offset, a shape and strides. Whoever walks a container has to expect one
that holds itself, or another one twice; nothing of unknown depth is compared, hashed or printed here.

Python's own interpreter is used rather than the C one, whose memo is an array that a single opcode can make 64 GB long.

Source of the layout: torch/_utils.py (`_rebuild_*`), torch/serialization.py (`persistent_id`).
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar, NamedTuple

from llmkit.errors import InputError
from llmkit.tensors.spec import DType

MAX_PICKLE_NBYTES = 256_000_000
_MAX_READS = 20_000_000  # opcodes and their arguments; a tensor takes some sixty of them
_MAX_DIMENSIONS = 64  # of a tensor, as in torch
_MAX_KEY_PARTS = 16
_Scalar = str | bytes | int | float | None


class StorageRef(NamedTuple):
    """A run of elements in the file: its key, element type (None: bytes), length, and where a legacy view begins."""

    key: str
    dtype: DType | None
    numel: int
    start: int


class TensorRef(NamedTuple):
    """A tensor over a storage; offset and strides count elements."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle names something that is not on the list."""


# The stand-ins are named tuples: they have no attribute that a BUILD opcode could set.
class _Callable(NamedTuple):
    name: str
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _StorageType(NamedTuple):
    dtype: DType | None


class _TorchDType(NamedTuple):
    name: str


class _Opaque:
    """A value that is no tensor and is never read: it ignores whatever is put into it."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Swallow one value."""

    def extend(self, values: Any) -> None:
        """Swallow several values."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_key(value: Any) -> bool:
    """Whether hashing and printing a value takes as long as it is: a tuple may hold itself a billion times over."""
    if type(value) is tuple:
        return len(value) <= _MAX_KEY_PARTS and all(isinstance(part, _Scalar) for part in value)
    return isinstance(value, _Scalar)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: DType | None) -> TensorRef:
    if not isinstance(storage, StorageRef) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise pickle.UnpicklingError("a tensor is not made of a storage, a shape and strides")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if not all(_is_count(n) for n in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("offset, shape and strides do not describe a tensor: not all are whole numbers")
    if dtype is None:
        raise pickle.UnpicklingError("a tensor over untyped bytes has no dtype")
    return TensorRef(storage, dtype, offset, tuple(shape), tuple(strides))


def _require_as_stored(metadata: Any = None) -> None:
    """Refuse a view that torch conjugates or negates when it is read: its bytes are not its values."""
    if metadata:
        bits = ", ".join(map(str, metadata)) if isinstance(metadata, dict) else type(metadata).__name__
        raise pickle.UnpicklingError(f"a tensor is not stored as it is: its metadata says {bits}")


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = False, _hooks: Any = None, *metadata: Any
) -> TensorRef:
    _require_as_stored(*metadata)
    return _tensor(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *metadata: Any
) -> TensorRef:
    _require_as_stored(*metadata)
    element = next((d for d in DType if isinstance(dtype, _TorchDType) and d.torch_name == dtype.name), None)
    if element is None:
        name = dtype.name if isinstance(dtype, _TorchDType) else type(dtype).__name__
        raise pickle.UnpicklingError(f"dtype {name} is not one that checkpoints store")
    return _tensor(storage, offset, shape, strides, element)


def _first(value: Any, *_rest: Any) -> Any:
    return value


def _rebuild_from_type(function: Any, _type: Any, args: Any, *_state: Any) -> Any:
    if not isinstance(function, _Callable) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("a tensor with attributes is not rebuilt from a tensor")
    return function(*args)


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    pairs = list(items.items() if isinstance(items, dict) else items)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and _is_key(pair[0]) for pair in pairs):
        raise pickle.UnpicklingError("an OrderedDict is not made of keys and values")
    return OrderedDict(pairs)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("_codecs.encode is only read for text in latin1")
    return text.encode("latin1")


STORAGES = {
    "DoubleStorage": DType.F64, "FloatStorage": DType.F32, "HalfStorage": DType.F16, "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64, "IntStorage": DType.I32, "ShortStorage": DType.I16, "CharStorage": DType.I8,
    "ByteStorage": DType.U8, "BoolStorage": DType.BOOL, "ComplexFloatStorage": DType.C64,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "torch.Tensor": _Opaque,
    "torch.nn.parameter.Parameter": _Opaque,
    "torch.device": _Opaque,
    "_codecs.encode": _encode,
    "builtins.set": _Opaque,
    "__builtin__.set": _Opaque,
    "collections.defaultdict": _Opaque,
    "collections.Counter": _Opaque,
    "numpy.dtype": _Opaque,
    "numpy.ndarray": _Opaque,
    "numpy.core.multiarray.scalar": _Opaque,
    "numpy.core.multiarray._reconstruct": _Opaque,
    "numpy._core.multiarray.scalar": _Opaque,
    "numpy._core.multiarray._reconstruct": _Opaque,
}
# Ways to make objects that tensors do not need, and lengths that are allocated before they are read.
_REFUSED_OPCODES = (
    pickle.PERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip


class _Bounded:
    """A stream that raises rather than give more than `max_nbytes`, or be asked more than `max_reads` times."""

    def __init__(self, stream: IO[bytes], max_nbytes: int, max_reads: int) -> None:
        self._stream = stream
        self._max_nbytes, self._left = max_nbytes, max_nbytes
        self._max_reads, self._reads_left = max_reads, max_reads

    def _take(self, n: int) -> int:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise pickle.UnpicklingError(f"the pickled description has more than {self._max_reads} opcodes")
        if n < 0 or n > self._left:
            raise pickle.UnpicklingError(f"the pickled description is longer than {self._max_nbytes} bytes")
        return n

    def read(self, n: int) -> bytes:
        data = self._stream.read(self._take(n))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._stream.readline(min(self._left, 4096) + 1)
        self._left -= self._take(len(data))
        return data


_Interpreter: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]  # typeshed leaves it out


class _Unpickler(_Interpreter):  # type: ignore[misc]
    dispatch: ClassVar = {k: v for k, v in _Interpreter.dispatch.items() if bytes([k]) not in _REFUSED_OPCODES}

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for i in range(0, len(items) - 1, 2):
            self._set(self.stack[-1], items[i], items[i + 1])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        for i in range(0, len(items) - 1, 2):
            self._set(self.stack[-1], items[i], items[i + 1])

    def load_build(self) -> None:
        self.stack.pop()  # attributes of an object: nobody reads them, and one might be called like a method

    def load_empty_set(self) -> None:
        self.append(_Opaque())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(_Opaque())

    def load_additems(self) -> None:
        self.pop_mark()

    dispatch |= {
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict,
        pickle.BUILD[0]: load_build, pickle.EMPTY_SET[0]: load_empty_set, pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
    }  # fmt: skip

    def _set(self, container: Any, key: Any, value: Any) -> None:
        if isinstance(container, dict):
            if not _is_key(key):
                raise pickle.UnpicklingError(f"a key is neither text nor a number, but a {type(key).__name__}")
            container[key] = value
        elif not isinstance(container, _Opaque):
            raise pickle.UnpicklingError(f"items are set in a {type(container).__name__}")

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _FUNCTIONS:
            return _Callable(full, _FUNCTIONS[full])
        if module in ("torch", "torch.storage", "torch.cuda"):
            if name in STORAGES:
                return _StorageType(STORAGES[name])
            if name == "UntypedStorage":
                return _StorageType(None)
            if any(name == d.torch_name for d in DType):
                return _TorchDType(name)
        raise _RefusedError(full)

    def persistent_load(self, pid: Any) -> StorageRef:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or not isinstance(pid[0], str) or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id does not name a storage")
        kind, key, numel, start = pid[1], pid[2], pid[4], 0
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(numel):
            raise pickle.UnpicklingError("a storage has no type, key or length")
        if len(pid) == 6 and pid[5] is not None:  # legacy: a view (key, offset, length) of another storage
            _view_key, start, view_numel = pid[5]
            if not _is_count(start) or not _is_count(view_numel) or start + view_numel > numel:
                raise pickle.UnpicklingError(f"a view of storage {key} reaches beyond it")
        return StorageRef(key, kind.dtype, numel, start)


_MALFORMED = (
    pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
    RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip


def load(stream: IO[bytes], where: str, *, max_nbytes: int = MAX_PICKLE_NBYTES, max_reads: int = _MAX_READS) -> Any:
    """The next pickle of a stream, with `TensorRef` for tensors.

    Args:
        where: what is being read, for messages.
        max_nbytes, max_reads: where a pickle is too long, in bytes and in opcodes and their arguments.

    Raises:
        InputError: a global that is not on the list, or a pickle that is malformed or too long.
    """
    try:
        return _Unpickler(_Bounded(stream, max_nbytes, max_reads), encoding="latin1").load()
    except _RefusedError as refused:
        raise InputError(
            f"{where} refuses to load: its pickle wants to run {refused}, which is no part of a tensor",
            hint="if you trust its author, load it with torch yourself and save the tensors as safetensors",
        ) from None
    except _MALFORMED as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"an opcode or key that tensors do not need ({error})"
        raise InputError(f"{where}: malformed or unsupported pickle: {reason}") from error
