"""One table of names, inverted by code: slot id <-> tensor name.

A slot is what a file stores: `layers.3.attn.q.weight`, or `layers.3.attn.qkv.weight` where q, k and v are one tensor.
How the weights of the kinds are stored in it is the type of the entry: a plain stem, `Fused`, `Transposed`, or
`Stacked`. The number of an expert is `{e}` in both: `"mlp.experts.{e}.up": "mlp.experts.{e}.up_proj"`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from llmkit.architecture.slots import is_of_expert
from llmkit.errors import PluginError


@dataclass(frozen=True)
class Fused:
    """Linear layers of one input, stored as one.

    Attributes:
        name: the stem in files.
        parts: stems of the layers beside the entry's own, in the order of their rows (`("q", "k", "v")` under
            `attn.qkv`).
        rows: `stacked` has all rows of the first, then of the second, …; `per_group` has for each key/value head the
            rows of its queries, of its key and of its value (for multi-head attention q, k, v of head 0, of head 1, …).
        groups: a formula: how many groups `per_group` has.
    """

    name: str
    parts: tuple[str, ...]
    rows: Literal["stacked", "per_group"] = "stacked"
    groups: str = "kv_heads"


@dataclass(frozen=True)
class Transposed:
    """A matrix stored as [in, out]; its bias is as ever."""

    stored: str | Fused


@dataclass(frozen=True)
class Stacked:
    """The matrices of all experts in one tensor [experts, rows, columns], their biases in one [experts, rows].

    Attributes:
        name: the stem in files.
        parts: stems of an expert's layers (`("gate", "up")` under `mlp.experts.gate_up`), which are fused if several.
        rows: `stacked` has all rows of the first, then of the second, …; `interleaved` a row of each in turn.
        is_transposed: each matrix is stored as [in, out]; `rows` are then columns.
        weight, bias: what follows the stem in the names of the two.
    """

    name: str
    parts: tuple[str, ...]
    rows: Literal["stacked", "interleaved"] = "stacked"
    is_transposed: bool = False
    weight: str = ""
    bias: str = "_bias"


Entry = str | Fused | Transposed | Stacked
EXPERT = "{e}"
_NUMBER = re.compile(r"\.(0|[1-9][0-9]*)\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's weight is stored.

    Attributes:
        leaf: of the slot.
        entry: how it is stored with others; None for alone.
        is_transposed: stored as [in, out].
    """

    leaf: str
    entry: Fused | Stacked | None = None
    is_transposed: bool = False


def stem_of(entry: Entry) -> str:
    """The stem in files of a table entry."""
    if isinstance(entry, Transposed):
        entry = entry.stored
    return entry if isinstance(entry, str) else entry.name


@dataclass(frozen=True)
class Names:
    """How a family spells its tensors. Each entry maps a slot, or the stem of several, to a name or its stem.

    `embed="model.embed_tokens"` names `embed.weight` `model.embed_tokens.weight`; whatever follows the stem is kept.

    Attributes:
        block: the prefix of a layer's tensors, with `{i}` for its number.
        slots: stem inside a block -> stem after the prefix (`"attn.q": "self_attn.q_proj"`), or how it is stored.
        outer: the same for what lies outside the blocks besides embed, final_norm and head.
        ignored: patterns of buffers that old files store and nothing needs.
        in_memory: stems that transformers renames when it reads a file, to what: lists of modules may use either.
        respelled: what a later version of transformers writes instead of a part of a name, and that part.
        apart: entries of an expert's layers in files that have no stacks.
        apart_in: layouts of quantized matrices whose reader in transformers makes linear layers of the experts, and
            finds none of them in a stack: beside these, files have `apart`.
    """

    embed: str
    final_norm: str
    head: str
    block: str
    slots: Mapping[str, Entry] = field(default_factory=dict)
    outer: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    in_memory: Mapping[str, str] = field(default_factory=dict)
    respelled: Mapping[str, str] = field(default_factory=dict)
    apart: Mapping[str, Entry] = field(default_factory=dict)
    apart_in: tuple[str, ...] = ()

    @property
    def without_stacks(self) -> Names:
        """The names in files that have the experts one by one; the same where there are no such files."""
        if not self.apart:
            return self
        slots = {slot: entry for slot, entry in self.slots.items() if not isinstance(entry, Stacked)}
        return replace(self, slots={**slots, **self.apart})

    def fitting(self, tensors: Iterable[str]) -> Names:
        """Those of the two that a file with these names has."""
        if not self.apart:
            return self
        single = self.without_stacks
        table = NameTable(single)
        return single if any(is_of_expert(table.slot(name) or "") for name in tensors) else self

    def loaded(self, module: str) -> str:
        """What transformers calls a module of a file once it has read it."""
        for stored, loaded in self.in_memory.items():
            if f".{module}".endswith(f".{stored}"):
                return module.removesuffix(stored) + loaded
        return module

    def without(self, *stems: str) -> dict[str, Entry]:
        """The slots but these and those below them (`mlp`, `attn.q`)."""
        left_out = tuple(f"{stem}." for stem in stems)
        return {slot: entry for slot, entry in self.slots.items() if not f"{slot}.".startswith(left_out)}

    @property
    def prefix(self) -> str:
        """What files of the model without its head leave out at the start of every name (`transformer.`), or ""."""
        first = {name.partition(".")[0] for name in (self.embed, self.final_norm, self.block)}
        return f"{first.pop()}." if len(first) == 1 else ""


class NameTable:
    """Both directions of a `Names`.

    Raises:
        PluginError: two slots share one name, or the block prefix has no `{i}`.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        if names.block.count("{i}") != 1:
            raise PluginError(f"the block prefix {names.block!r} needs exactly one {{i}}")
        self._outer = {"embed": names.embed, "final_norm": names.final_norm, "head": names.head, **names.outer}
        self._inner = {key: name for slot, entry in names.slots.items() for key, name in _named(slot, entry)}
        self._stored_in = {part: slot for slot, entry in names.slots.items() for part in parts_of(slot, entry)}
        self._outer_back = _inverted(self._outer)
        self._inner_back = _inverted(self._inner)
        before, after = names.block.split("{i}")
        self._block = re.compile(re.escape(before) + r"(0|[1-9][0-9]*)" + re.escape(after) + r"(.+)")

    def stored_in(self, leaf: str) -> Place:
        """Where a layer's leaf (`attn.q.weight`, `mlp.experts.17.up.weight`) is stored."""
        pattern, number = _numbered(leaf)
        stem, _, last = pattern.rpartition(".")
        if stem not in self._stored_in and stem not in self.names.slots:
            stem, number = leaf.rpartition(".")[0], ""
        slot = self._stored_in.get(stem, stem)
        entry = self.names.slots.get(slot, slot)
        is_matrix, is_transposed = last == "weight", isinstance(entry, Transposed)
        if isinstance(entry, Transposed):
            entry = entry.stored
        place = f"{slot}.{last}".replace(EXPERT, number)
        if isinstance(entry, Stacked):
            return Place(place, entry, is_matrix and entry.is_transposed)
        return Place(place, entry if isinstance(entry, Fused) else None, is_matrix and is_transposed)

    def name(self, slot: str) -> str:
        """The tensor name of slot id `slot` (`layers.3.attn.q.weight`).

        Raises:
            PluginError: the table has no entry for it.
        """
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", slot)
        if match is None:
            translated = _translated(slot, self._outer)
        else:
            inner = _inner_translated(match[2], self._inner)
            translated = None if inner is None else self.names.block.format(i=int(match[1])) + inner
        if translated is None:
            raise PluginError(f"the name table has no entry for slot {slot!r}")
        return translated

    def slot(self, name: str) -> str | None:
        """The slot id of a tensor name, or None when the table does not know it."""
        outer = _translated(name, self._outer_back)  # first: a family may file one of these under its first block
        match = self._block.fullmatch(name) if outer is None else None
        if match is None:
            return outer
        inner = _inner_translated(match[2], self._inner_back)
        return None if inner is None else f"layers.{match[1]}.{inner}"

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


def linears(slot: str, stem: str, parts: Iterable[str] = ("gate", "up", "down")) -> dict[str, Entry]:
    """Entries `SLOT.PART`: `STEM.PART_proj`, as most families call linear layers; by default those of a gated MLP."""
    return {f"{slot}.{part}": f"{stem}.{part}_proj" for part in parts}


def parts_of(slot: str, entry: Entry) -> list[str]:
    """The stems of the layers that an entry stores together; none for a plain one."""
    fused = entry.stored if isinstance(entry, Transposed) else entry
    if isinstance(fused, str):
        return []
    before = slot.rpartition(".")[0]
    before = f"{before}.{EXPERT}" if isinstance(fused, Stacked) else before
    return [f"{before}.{part}" if before else part for part in fused.parts]


def _named(slot: str, entry: Entry) -> list[tuple[str, str]]:
    """What a table has for an entry: a stem, or whole names where the last word is not kept."""
    if not isinstance(entry, Stacked):
        return [(slot, stem_of(entry))]
    return [(f"{slot}.weight", entry.name + entry.weight), (f"{slot}.bias", entry.name + entry.bias)]


def _numbered(text: str) -> tuple[str, str]:
    """`mlp.experts.{e}.up.weight` and the number of `mlp.experts.17.up.weight`; "" where there is none."""
    match = _NUMBER.search(text)
    return (text, "") if match is None else (f"{text[: match.start()]}.{EXPERT}.{text[match.end() :]}", match[1])


def _inner_translated(text: str, table: Mapping[str, str]) -> str | None:
    pattern, number = _numbered(text)
    if number:
        translated = _translated(pattern, table)
        if translated is not None and translated.count(EXPERT) == 1:
            return translated.replace(EXPERT, number)
    return _translated(text, table)


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
