"""The natural order of tensors' names, in which every checkpoint has them: `layers.2` before `layers.10`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from llmkit.tensors.lazy import Lazy
from llmkit.tensors.names import cut

_DIGITS, _MOST_DIGITS = re.compile("[0-9]+"), 300


def natural_key(name: str) -> str:
    """Sort key that puts `layers.2` before `layers.10`, and numbers before words: they begin with their length."""
    return _DIGITS.sub(_sized, name)


def _sized(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    n = len(digits)
    return f"\0{chr(n)}{digits}" if n <= _MOST_DIGITS else f"\0{chr(_MOST_DIGITS + 1)}"


def sort_tensors(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The same tensors in natural order of their names."""
    key_of = cache(natural_key)  # of what many names have in common

    def key(name: str) -> str:
        before, number, after = cut(name)
        return key_of(before) + key_of(number) + after

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def in_order(tensors: Mapping[str, Lazy], known: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The same in natural order, which names have that lie in `known` in their order there."""
    left = iter(known)  # each name is looked for behind the one before
    return dict(tensors) if all(name in left for name in tensors) else sort_tensors(tensors)
