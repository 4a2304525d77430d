"""What the plugins know, as tables to match with: stems of slots, and config keys of sizes and of fields of kinds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key, as_key
from llmkit.architecture.kinds import PerLayer
from llmkit.architecture.names import Fused, Names, Transposed, stem_of
from llmkit.architecture.registry import Registry, default_registry
from llmkit.entry_points import EntryPoint, entries
from llmkit.errors import PluginError
from llmkit.layouts.opening import GROUP, layouts

__all__ = ["Known", "known_plugins", "likeness", "without_computed"]

Entry = str | Fused | Transposed
# The values that `Key`s of a kind are told apart by are those of its field: `eps`, `act`, `theta`, …
_PARTS = ("embedding", "block", "final_norm", "head")


@dataclass(frozen=True)
class Known:
    """All that the plugins name.

    Attributes:
        architectures: those of the plugins, the one that most others are equivalent to first.
        layer_slots: name of each -> the weights that its layers have in any of its variants, and their stems.
        inner, outer: slot -> the entries that name tables have for it, in a layer and outside.
        keys: name of a size, or of a field of a kind -> spellings in config.json.
    """

    architectures: tuple[Architecture, ...]
    layer_slots: Mapping[str, frozenset[str]]
    inner: Mapping[str, tuple[Entry, ...]]
    outer: Mapping[str, tuple[Entry, ...]]
    keys: Mapping[str, tuple[str, ...]]


def known_plugins() -> Known:
    """The tables of all plugins and layouts that load."""
    return _known(default_registry(), entries(GROUP))


@cache
def _known(registry: Registry, _: tuple[EntryPoint, ...]) -> Known:
    """The same, made once for what is registered."""
    loaded = [a for a in registry.load_all().values() if not isinstance(a, PluginError)]
    n_equivalent = {a.name: sum(a.name in other.equivalents for other in loaded) for a in loaded}
    loaded.sort(key=lambda a: -n_equivalent[a.name])
    inner: dict[str, dict[Entry, None]] = {}
    outer: dict[str, dict[Entry, None]] = {}
    keys: dict[str, dict[str, None]] = {}
    tables = [a.names for a in loaded]
    tables += [spelling.names for layout in layouts() for spelling in layout.spellings]
    for table in tables:
        for slot, entry in table.slots.items():
            inner.setdefault(slot, {slot.rpartition(".")[2]: None})[entry] = None
        for slot, stem in outer_stems(table).items():
            outer.setdefault(slot, {slot: None})[stem] = None
    for architecture in loaded:
        for name, key in _keys_of(architecture):
            keys.setdefault(name, {}).update(dict.fromkeys(key.spellings))
    return Known(
        tuple(loaded),
        {a.name: _layer_slots(a) for a in loaded},
        {slot: tuple(entries) for slot, entries in inner.items()},
        {slot: tuple(entries) for slot, entries in outer.items()},
        {name: tuple(spellings) for name, spellings in keys.items()},
    )


def _layer_slots(architecture: Architecture) -> frozenset[str]:
    variants = (None, *architecture.variants)
    leaves = {leaf for v in variants for leaf in architecture.bind(architecture.tiny_config(v)).block.slots()}
    return frozenset(leaves | {leaf.rpartition(".")[0] for leaf in leaves})


def outer_stems(names: Names) -> dict[str, str]:
    """Slot outside the layers -> stem."""
    return {"embed": names.embed, "final_norm": names.final_norm, "head": names.head, **names.outer}


def _keys_of(architecture: Architecture) -> Iterator[tuple[str, Key]]:
    """The keys of sizes and of fields of kinds, by the name of the size or the field."""
    for size in fields(architecture.dims):
        key = as_key(getattr(architecture.dims, size.name))
        if isinstance(key, Key):
            yield size.name, key
    for part in _PARTS:
        yield from _keys_in(without_computed(getattr(architecture, part), architecture.tiny))


def _keys_in(kind: Any) -> Iterator[tuple[str, Key]]:
    for field in fields(kind) if is_dataclass(kind) else ():
        value = getattr(kind, field.name)
        if field.name in getattr(kind, "string_keys", ()):
            value = as_key(value)
        if isinstance(value, Key):
            yield field.name, value
        else:
            yield from _keys_in(value)


def without_computed(value: Any, config: Mapping[str, Any]) -> Any:
    """A kind with what `Computed` and `PerLayer` (its first layer) give for a config; its `Key`s stay."""
    if isinstance(value, Computed):
        return without_computed(value.of(config), config)
    if isinstance(value, PerLayer):
        return without_computed(value.of(config, 0), config)
    if not is_dataclass(value) or isinstance(value, type | Key):
        return value
    changed = {f.name: without_computed(getattr(value, f.name), config) for f in fields(value)}
    return type(value)(**changed)


def likeness(stem: str, known: Entry) -> float:
    """How much a stem is like one of a name table: 3 for the same, 2 for the same last word, else a ratio below 1."""
    return _likeness(stem, stem_of(known))


@cache
def _likeness(stem: str, known: str) -> float:
    if stem == known:
        return 3.0
    one, other = (_plain(s.rpartition(".")[2]) for s in (stem, known))
    return 2.0 if one == other else SequenceMatcher(None, one, other).ratio()


def _plain(word: str) -> str:
    """Without underscores, `n` for a number, and the abbreviation of key and value."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(n|num)_", "", word.lower()).replace("kv", "keyvalue"))
