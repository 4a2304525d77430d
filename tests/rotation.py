"""Tables of families × ways that would take too long whole: a few families in every way, each of the others in one.

The few have every sort of storage, attention and state between them; the ways go round among the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

N = TypeVar("N")
W = TypeVar("W")

EVERY_WAY = {
    "llama", "gpt2", "bloom", "chatglm", "falcon40b", "gemma2", "phi3", "rwkv", "mixtral", "gpt_oss", "deepseek3",
    "qwen3_next", "falcon_h1",
}  # fmt: skip


def rotated(names: Iterable[N], ways: Sequence[W]) -> list[tuple[N, W]]:
    """The pairs of the table; `names` are families, or tuples that begin with one."""
    pairs: list[tuple[N, W]] = []
    for i, name in enumerate(names):
        is_whole = (name[0] if isinstance(name, tuple) else name) in EVERY_WAY
        pairs += [(name, way) for way in (ways if is_whole else [ways[i % len(ways)]])]
    return pairs
