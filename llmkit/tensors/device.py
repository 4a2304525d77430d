"""Torch devices: what `--device` names, whether torch has it, and the default device of new tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from llmkit.errors import InputError, RequirementError
from llmkit.lazy_imports import torch

T = TypeVar("T", bound=Any)

CPU = "cpu"
_TYPES = (CPU, "cuda", "mps", "xpu")


def torch_device(name: str) -> torch.device:
    """The device of a name: `cpu`, `cuda`, `cuda:1`, or `auto` (CUDA if torch sees a device, else the CPU).

    `cuda` without a number is the first device, or under torchrun that of the local rank.

    Raises:
        InputError: no name of a device, or the local rank is no number.
        RequirementError: torch does not see this device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in _TYPES:
        raise InputError(f"unknown device {name!r}; expected cpu, cuda, cuda:1 or auto", hint="--device cpu")
    if device.type == CPU:
        return torch.device(CPU)
    n = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n:
        seen = f"{n} of them, cuda:0 to cuda:{n - 1}" if n else "no CUDA device"
        raise RequirementError(f"device {name!r} is not there: torch sees {seen}", hint="--device cpu")
    if device.type == "cuda":
        return torch.device("cuda", torchrun_number("LOCAL_RANK", "0") % n if device.index is None else device.index)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises without a backend
        raise RequirementError(f"device {name!r} is not there for torch", hint="--device cpu") from error
    return device


def torchrun_number(variable: str, default: str = "") -> int:
    """A number that torchrun sets in the environment.

    Raises:
        InputError: it is no number.
    """
    value = os.environ.get(variable, default)
    if not value.isdecimal():
        raise InputError(f"the environment has {variable}={value!r}, which is no number", hint=f"unset {variable}")
    return int(value)


def device_named(name: str) -> str:
    """The full name of a device (`cuda:0`), checked by `torch_device`; `cpu` is returned without importing torch."""
    return name if name == CPU else str(torch_device(name))


def product_dtype(device: str) -> torch.dtype | None:
    """bfloat16 where the device multiplies it natively, else None; not timed, so that resumed runs agree."""
    if device != CPU:
        return torch.bfloat16
    return torch.bfloat16 if _has_products("bf16") else None


def is_emulated(dtype: str, device: str) -> bool:
    """Whether an x86 processor computes `bfloat16` or `float16` by other instructions, more slowly than float32."""
    narrow = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    is_x86 = _capabilities().get("architecture") == "x86_64"
    return device == CPU and narrow is not None and is_x86 and not _has_products(narrow)


def _has_products(narrow: str) -> bool:
    capabilities = _capabilities()
    return bool(capabilities.get(f"avx512_{narrow}") or capabilities.get(f"amx_{narrow}"))


def _capabilities() -> Mapping[str, Any]:
    """Of the processor; empty where this version of torch does not tell."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@contextmanager
def default_device(device: torch.device | str) -> Iterator[None]:
    """Inside, this thread makes tensors on `device` where the call names none."""
    wanted = torch.device(device)
    if torch.get_default_device() == wanted:  # a mode costs a little at every call
        yield
        return
    with wanted:
        yield


def to_device(holder: T, device: torch.device | str) -> T:
    """The dataclass with all its tensor fields on `device`; `holder` itself if they are there already."""
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    tensors: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor)}
    is_there = all(tensor is values[name] for name, tensor in tensors.items())
    return holder if is_there else replace(holder, **tensors)
