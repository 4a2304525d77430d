"""Tensor names as the family spells them, where a published file left their beginning out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.names import NameTable
from llmkit.architecture.registry import find
from llmkit.errors import PluginError, listing
from llmkit.tensors.lazy import Lazy

__all__ = ["in_family_names"]


def in_family_names(tensors: Mapping[str, Lazy], config: Mapping[str, Any]) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors with the prefix that the family's names begin with, and what to tell the user.

    Files saved from the model without its head lack it (`h.0.ln_1.weight`); those saved with the head have it
    (`transformer.h.0.ln_1.weight`), as have adapters, deltas and every library's idea of the family.
    """
    try:
        architecture = find(config)
    except PluginError:  # whoever needs the architecture will hear of it
        architecture = None
    if architecture is None or not architecture.names.prefix:
        return dict(tensors), []
    prefix, table = architecture.names.prefix, NameTable(architecture.names)
    found: dict[str, Lazy] = {}
    changed = []
    for name, lazy in tensors.items():
        whole = prefix + name
        is_meant = table.slot(name) is None and (table.slot(whole) is not None or table.is_ignored(whole))
        if is_meant and not name.startswith(prefix) and whole not in tensors:
            changed.append(name)
            found[whole] = lazy
        else:
            found[name] = lazy
    if not changed:
        return found, []
    return found, [
        f"{len(changed)} names are read with {prefix!r} before them, as the family has it ({listing(changed, 1)})"
    ]
