"""The names in a checkpoint's headers: those of a plugin, and of the rest what tables of plugins and layouts tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.names import Entry, Fused, Names, NameTable, Stacked, Transposed, parts_of, stem_of
from llmkit.errors import InputError, listing
from llmkit.tensors.spec import DType, TensorSpec

_OUTER = ("head", "embed", "final_norm")
# Tables and masks that old files store.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids|attention\.mask|attn\.mask)$")


@dataclass(frozen=True)
class Headers:
    """The tensors of a checkpoint by where they are.

    Attributes:
        block: the prefix of a layer, with `{i}`.
        n_layers: how many there are.
        inner: stem after that prefix -> shape of the weight, in the last layer; () of a stem without a weight.
        outer: the same of what lies outside the layers.
        ignored: patterns of buffers.
    """

    block: str
    n_layers: int
    inner: Mapping[str, tuple[int, ...]]
    outer: Mapping[str, tuple[int, ...]]
    ignored: tuple[str, ...]

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of a table entry's weight as it is stored."""
        return self.inner.get(stem_of(entry)) or self.outer.get(stem_of(entry), ())


def read_headers(specs: Mapping[str, TensorSpec], label: str) -> Headers:
    """Sort the tensors of a checkpoint.

    Raises:
        InputError: no names with layer numbers, or no matrix outside the layers.
    """
    numbered = Counter(match[1] for name in specs if (match := re.fullmatch(r"((?:.*?\.)?)\d+\..+", name)))
    if not numbered:
        raise InputError(f"{label}: no tensor has a layer's number in its name; a plugin cannot be drafted from that")
    before = numbered.most_common(1)[0][0]
    inner: dict[str, tuple[int, ...]] = {}
    outer: dict[str, tuple[int, ...]] = {}
    ignored: dict[str, None] = {}
    n_layers = 0
    for name, spec in specs.items():
        match = re.fullmatch(re.escape(before) + r"(\d+)\.(.+)", name)
        n_layers = max(n_layers, int(match[1]) + 1) if match else n_layers
        leaf = match[2] if match else name
        stem, _, last = leaf.rpartition(".")
        if _BUFFERS.search(leaf) or spec.dtype is DType.BOOL or (last == "bias" and len(spec.shape) == 4):
            ignored[f"*.{leaf}" if match else name] = None
            continue
        stem, shapes = stem if last in ("weight", "bias") else leaf, inner if match else outer
        shapes[stem] = spec.shape if last == "weight" else shapes.get(stem, ())
    if not any(len(shape) == 2 for shape in outer.values()):
        raise InputError(
            f"{label}: no embedding among the tensors outside the layers ({listing(outer) or 'none'}): "
            "a plugin cannot be drafted from that"
        )
    return Headers(f"{before}{{i}}.", n_layers, inner, outer, tuple(ignored))


class KnownNames:
    """All name tables that are known, looked up by stems; each answer is kept."""

    def __init__(self, tables: Sequence[Names]) -> None:
        self._pairs = tuple(dict.fromkeys(pair for table in tables for pair in table.slots.items()))
        self._answers: dict[tuple[str, bool], list[tuple[str, Entry]]] = {}
        self._outer: dict[str, list[str]] = {}
        for slot, stem in (pair for table in tables for pair in _outer_names(table).items()):
            self._outer.setdefault(slot, []).append(stem)

    def slots_of(self, stem: str, exact: bool) -> list[tuple[str, Entry]]:
        """Slots of this stem in some table; else those with the same last word, in a part of the layer that may be."""
        if (stem, exact) not in self._answers:
            self._answers[stem, exact] = list(_known_as(stem, self._pairs, exact))
        return self._answers[stem, exact]

    def outer_of(self, slot: str) -> list[str]:
        """The names of a slot outside the layers."""
        return self._outer.get(slot, [])


def names_like(headers: Headers, like: Architecture, known: KnownNames) -> Names:
    """The name table of a checkpoint with the layers of a plugin."""
    needed, slots = like.stems_of_layers, {**like.names.slots}
    for exact, stem in product((True, False), headers.inner):
        for slot, entry in () if stem in map(stem_of, slots.values()) else known.slots_of(stem, exact):
            parts = set(parts_of(slot, entry) or [slot])
            if not parts <= needed:
                continue
            rest = {s: e for s, e in slots.items() if not parts & set(parts_of(s, e) or [s])}
            if not any(stem_of(slots[s]) in headers.inner for s in slots.keys() - rest.keys()):
                plain = _plain(entry)
                slots = {**rest, slot: stem if isinstance(plain, str) else replace(plain, name=stem)}
                break
    outer = _outer_like(headers, like.names, known)
    hidden, down = headers.shape(outer["embed"])[-1:], headers.shape(slots.get("mlp.down", ""))
    if len(set(down)) == 2:  # matrices are stored [in, out], or not, as this one is, which is not square
        is_transposed = down[1:] == hidden
        for slot, entry in slots.items():
            plain = _plain(entry)
            if len(headers.shape(entry)) == 2 and not isinstance(plain, Stacked):
                slots[slot] = Transposed(plain) if is_transposed else plain
    ignored = like.names.ignored if headers.block == like.names.block else headers.ignored
    outer_names: dict[str, Any] = {slot: outer.pop(slot) for slot in _OUTER}
    return replace(like.names, **outer_names, outer=outer, block=headers.block, slots=slots, ignored=ignored)


def n_unnamed(headers: Headers, names: Names) -> int:
    """How many stems of the layers a table has no slot for: at least as many tensors do not fit it."""
    table = NameTable(names)
    tensors = [
        [f"{headers.block.format(i=0)}{stem}{end}" for end in (".weight", ".bias", "")] for stem in headers.inner
    ]
    return sum(not any(table.slot(name) or table.is_ignored(name) for name in of_stem) for of_stem in tensors)


def _plain(entry: Entry) -> str | Fused | Stacked:
    return entry.stored if isinstance(entry, Transposed) else entry


def _known_as(stem: str, pairs: Sequence[tuple[str, Entry]], exact: bool) -> Iterator[tuple[str, Entry]]:
    around, _, word = stem.lower().rpartition(".")
    is_attention, is_mlp = "att" in around, any(w in around for w in ("mlp", "ff", "feed"))
    for slot, entry in pairs:
        known, part = stem_of(entry), slot.partition(".")[0]
        is_apart = (part == "attn" and is_mlp) or (part == "mlp" and is_attention)
        if known == stem if exact else known.rpartition(".")[2].lower() == word and not is_apart:
            yield slot, entry


def _outer_like(headers: Headers, names: Names, tables: KnownNames) -> dict[str, str]:
    """What lies outside the layers; told by shapes where no table knows its name."""
    stems = _outer_names(names)
    for slot in [slot for slot, stem in stems.items() if stem not in headers.outer]:
        known = tables.outer_of(slot)
        words = {stem.rpartition(".")[2] for stem in known}
        rank = 1 if slot.endswith("norm") else 2
        free = [s for s in headers.outer if s not in stems.values() and len(headers.shape(s)) == rank]
        called = [s for s in free if s in known] or [s for s in free if s.rpartition(".")[2] in words]
        if not called and slot in ("embed", "final_norm"):
            called = sorted(free, key=headers.shape, reverse=True)
        stems[slot] = called[0] if called else stems[slot]
    return stems


def _outer_names(names: Names) -> dict[str, str]:
    return {slot: getattr(names, slot) for slot in _OUTER} | dict(names.outer)
