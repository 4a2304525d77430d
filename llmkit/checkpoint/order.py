"""The natural order of tensors' names, in which every checkpoint has them: `layers.2` before `layers.10`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Any

from llmkit.tensors.lazy import Lazy
from llmkit.tensors.names import cut

_DIGITS, _MOST_DIGITS = re.compile(r"(\d+)"), 300


def natural_key(name: str) -> list[Any]:
    """Sort key that puts `layers.2` before `layers.10`."""
    parts: list[Any] = _DIGITS.split(name)
    parts[1::2] = [int(p) if len(p) <= _MOST_DIGITS else inf for p in parts[1::2]]
    return parts


def sort_tensors(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The same tensors in natural order of their names."""
    heads: dict[str, list[Any]] = {}  # keys of what many names begin with

    def key(name: str) -> list[Any]:
        head, rest = cut(name)
        if head not in heads:
            heads[head] = natural_key(head)
        *before, last = heads[head]
        return [*before, last + rest]

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def in_order(tensors: Mapping[str, Lazy], known: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The same in natural order, which names have that lie in `known` in their order there."""
    left = iter(known)  # each name is looked for behind the one before
    return dict(tensors) if all(name in left for name in tensors) else sort_tensors(tensors)
