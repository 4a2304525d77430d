"""What wrappers around a training run leave in names of tensors: `torch.compile`, FSDP, data parallelism.

A wrapper is a component of the path (`model._orig_mod.layers.0`), except data parallelism's, which is only told by
every name beginning with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from llmkit.errors import InputError, listing

_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module")
_PARALLEL = "module."

T = TypeVar("T")


def unwrapped(name: str) -> str:
    """The name without components that wrappers add anywhere."""
    if "_module" not in name and "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_wrappers(tensors: Mapping[str, T], where: str) -> tuple[dict[str, T], list[str]]:
    """The tensors by names without wrappers, and what to tell the user.

    Raises:
        InputError: two names become one.
    """
    stripped: dict[str, T] = {}
    for name, value in tensors.items():
        plain = unwrapped(name)
        if plain in stripped:
            raise InputError(f"{where}: {name} and another name are both {plain} without what wrappers added")
        stripped[plain] = value
    while stripped and all(name.startswith(_PARALLEL) for name in stripped):
        stripped = {name.removeprefix(_PARALLEL): value for name, value in stripped.items()}
    changed = [old for old, new in zip(tensors, stripped, strict=True) if old != new]
    if not changed:
        return stripped, []
    return stripped, [f"{len(changed)} names are read without what torch's wrappers added ({listing(changed, 1)})"]
