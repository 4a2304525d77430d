"""Data types and tensor specs: what is known of a tensor before a byte of it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import TYPE_CHECKING, Any

from llmkit.errors import InputError, suggestion
from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    from torch import dtype as TorchDtype


class DType(Enum):
    """An element type, named as safetensors names it. The value is (size in bits, torch's name).

    Attributes:
        bits: size of one element in bits.
        itemsize: the same in bytes.
        torch_name: the attribute of the `torch` module.
        is_float: a real floating-point type.
        is_arithmetic: one that sums are computed in: all but those of 8 bits.
    """

    F64 = (64, "float64")
    F32 = (32, "float32")
    F16 = (16, "float16")
    BF16 = (16, "bfloat16")
    F8_E4M3 = (8, "float8_e4m3fn")
    F8_E5M2 = (8, "float8_e5m2")
    F8_E8M0 = (8, "float8_e8m0fnu")
    I64 = (64, "int64")
    I32 = (32, "int32")
    I16 = (16, "int16")
    I8 = (8, "int8")
    U64 = (64, "uint64")
    U32 = (32, "uint32")
    U16 = (16, "uint16")
    U8 = (8, "uint8")
    BOOL = (8, "bool")
    C64 = (64, "complex64")

    __hash__ = object.__hash__

    def __init__(self, bits: int, torch_name: str) -> None:
        # Plain attributes: plans ask for them a million times, and a property of an enumeration is slow.
        self.bits, self.itemsize = bits, bits // 8
        self.torch_name = torch_name
        self.is_float = self.name.startswith(("F", "BF"))
        self.is_arithmetic = self.is_float and bits > 8

    @property
    def torch(self) -> TorchDtype:
        """The torch dtype (imports torch)."""
        dtype: TorchDtype = getattr(torch, self.torch_name)
        return dtype

    @classmethod
    def of(cls, dtype: TorchDtype) -> DType:
        """The DType of a torch dtype."""
        name = str(dtype).removeprefix("torch.")
        for member in cls:
            if member.torch_name == name:
                return member
        raise InputError(f"dtype {name} is not one that checkpoints store")

    @classmethod
    def parse(cls, text: str) -> DType:
        """A DType from what a person or a config writes: `float16`, `fp16`, `half`, `F16`, `torch.float16`."""
        word = text.strip().lower().removeprefix("torch.")
        word = _ALIASES.get(word, word)
        for member in cls:
            if word in (member.name.lower(), member.torch_name):
                return member
        names = ["float32", "float16", "bfloat16"]
        hint = suggestion(word, names, f"use one of {', '.join(names)}")
        raise InputError(f"unknown dtype {text!r}", hint=hint)


_ALIASES = {
    "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
    "double": "float64", "fp64": "float64",
}  # fmt: skip


MAX_DIMS = 64
"""Dimensions of a tensor: as many as numpy and torch compute with."""

_FORMS: dict[tuple[Any, ...], int] = {}


def form_of(key: tuple[Any, ...]) -> int:
    """Intern a form of specs or nodes: equal keys give one integer, so that nested forms compare in constant time."""
    return _FORMS.setdefault(key, len(_FORMS))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape of a tensor.

    Attributes:
        numel: number of elements (1 for a scalar).
        nbytes: size of the data in bytes.
        form: a number, the same for equal ones.
    """

    dtype: DType
    shape: tuple[int, ...]
    numel: int = field(init=False, compare=False, repr=False)
    nbytes: int = field(init=False, compare=False, repr=False)
    form: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", prod(self.shape))
        object.__setattr__(self, "nbytes", self.numel * self.dtype.itemsize)
        object.__setattr__(self, "form", form_of((self.dtype, self.shape)))

    @property
    def n_rows(self) -> int:
        """Length of the first dimension (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """How many elements lie between neighbours in each dimension, in row-major order, as torch counts them."""
        return tuple(prod(max(n, 1) for n in self.shape[i + 1 :]) for i in range(len(self.shape)))

    def with_rows(self, n_rows: int) -> TensorSpec:
        """The same spec with another first dimension."""
        return TensorSpec(self.dtype, (n_rows, *self.shape[1:]))

    def of_rows(self, rows: tuple[int, int]) -> TensorSpec:
        """The spec of rows `start:stop` of it; a scalar has one row and stays as it is."""
        return self.with_rows(rows[1] - rows[0]) if self.shape else self

    def with_dtype(self, dtype: DType) -> TensorSpec:
        """The same shape with another dtype."""
        return TensorSpec(dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `5GB`, `700MiB`, `1000000`. Decimal units are powers of 1000."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise InputError(f"size {text!r} is not a number of bytes", hint="write it as 5GB, 700MiB or 1000000")
    nbytes = int(float(match[1]) * _UNITS[match[2] or ""])
    if nbytes < 1:
        raise InputError(f"size {text!r} holds nothing", hint="write it as 5GB, 700MiB or 1000000")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """`1.23 GB` (decimal units, as file managers and the hub show sizes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
