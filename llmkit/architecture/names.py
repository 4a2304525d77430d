"""One table of names, inverted by code: slot id <-> tensor name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from llmkit.errors import PluginError

__all__ = ["NameTable", "Names"]


@dataclass(frozen=True)
class Names:
    """How a family spells its tensors. Each entry maps a slot, or the stem of several, to a name or its stem.

    `embed="model.embed_tokens"` names `embed.weight` `model.embed_tokens.weight`; whatever follows the stem is kept.

    Attributes:
        block: the prefix of a layer's tensors, with `{i}` for its number.
        slots: stem inside a block -> stem after the prefix (`"attn.q": "self_attn.q_proj"`).
        ignored: patterns of buffers that old files store and nothing needs.
    """

    embed: str
    final_norm: str
    head: str
    block: str
    slots: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class NameTable:
    """Both directions of a `Names`.

    Raises:
        PluginError: two slots share one name, or the block prefix has no `{i}`.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        if names.block.count("{i}") != 1:
            raise PluginError(f"the block prefix {names.block!r} needs exactly one {{i}}")
        self._outer = {"embed": names.embed, "final_norm": names.final_norm, "head": names.head}
        self._inner = dict(names.slots)
        self._outer_back = _inverted(self._outer)
        self._inner_back = _inverted(self._inner)
        before, after = names.block.split("{i}")
        self._block = re.compile(re.escape(before) + r"(0|[1-9][0-9]*)" + re.escape(after) + r"(.+)")

    def name(self, slot: str) -> str:
        """The tensor name of slot id `slot` (`layers.3.attn.q.weight`).

        Raises:
            PluginError: the table has no entry for it.
        """
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", slot)
        if match is None:
            found = _translated(slot, self._outer)
        else:
            inner = _translated(match[2], self._inner)
            found = None if inner is None else self.names.block.format(i=int(match[1])) + inner
        if found is None:
            raise PluginError(f"the name table has no entry for slot {slot!r}")
        return found

    def slot(self, name: str) -> str | None:
        """The slot id of a tensor name, or None when the table does not know it."""
        match = self._block.fullmatch(name)
        if match is not None:
            inner = _translated(match[2], self._inner_back)
            return None if inner is None else f"layers.{match[1]}.{inner}"
        return _translated(name, self._outer_back)

    def is_ignored(self, name: str) -> bool:
        """True for a buffer that files may store and nothing needs."""
        return any(fnmatchcase(name, pattern) for pattern in self.names.ignored)

    def faults(self, slots: Iterable[str]) -> list[str]:
        """What keeps the table from being one to one over `slots`; empty when it is."""
        faults: list[str] = []
        seen: dict[str, str] = {}
        for slot in slots:
            name = self.name(slot)
            if name in seen:
                faults.append(f"slots {seen[name]!r} and {slot!r} are both named {name!r}")
            seen[name] = slot
            back = self.slot(name)
            if back != slot:
                faults.append(f"slot {slot!r} is named {name!r}, which reads back as {back!r}")
        return faults


def _inverted(table: Mapping[str, str]) -> dict[str, str]:
    inverse: dict[str, str] = {}
    for slot, name in table.items():
        if name in inverse:
            raise PluginError(f"slots {inverse[name]!r} and {slot!r} are both named {name!r}")
        inverse[name] = slot
    return inverse


def _translated(text: str, table: Mapping[str, str]) -> str | None:
    """`text` with its longest stem (up to a dot, or the whole) replaced by the table's entry."""
    stem = text
    while stem:
        if stem in table:
            return table[stem] + text[len(stem) :]
        stem = stem.rpartition(".")[0]
    return None
