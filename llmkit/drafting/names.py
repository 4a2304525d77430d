"""The name table of a checkpoint: that of a plugin, and of the rest what tables of other plugins and layouts tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.names import Entry, Fused, Names, Transposed, parts_of, stem_of
from llmkit.drafting.headers import Headers

__all__ = ["names_like"]


def names_like(headers: Headers, like: Architecture, tables: Sequence[Names]) -> tuple[Names, dict[str, str]]:
    """The name table of a checkpoint with the layers of a plugin, and what of it is not certain: slot -> why.

    Args:
        tables: all that are known.
    """
    needed, checks = _layer_stems(like), {}
    slots = {**like.names.slots}
    for exact in (True, False):
        for stem in headers.inner:
            if stem in map(stem_of, slots.values()):
                continue
            for slot, entry in _known_as(stem, tables, exact):
                parts = set(parts_of(slot, entry) or [slot])
                rest = {s: e for s, e in slots.items() if not parts & set(parts_of(s, e) or [s])}
                if parts <= needed and not any(stem_of(slots[s]) in headers.inner for s in slots.keys() - rest.keys()):
                    plain = entry.stored if isinstance(entry, Transposed) else entry
                    slots = {**rest, slot: replace(plain, name=stem) if isinstance(plain, Fused) else stem}
                    if isinstance(plain, Fused):
                        checks[slot] = 'the order of rows (rows="stacked" or "per_group"), and of its parts'
                    break
    names = _outer_like(headers, replace(like.names, block=headers.block, slots=slots), tables)
    if headers.block != like.names.block:
        names = replace(names, ignored=headers.ignored)
    return _with_orientation(headers, names), checks


def _layer_stems(architecture: Architecture) -> set[str]:
    """The stems of the weights that its layers have in any of its variants."""
    configs = [architecture.tiny_config(v) for v in (None, *architecture.variants)]
    return {leaf.rpartition(".")[0] for config in configs for leaf in architecture.bind(config).block.slots()}


def _known_as(stem: str, tables: Sequence[Names], exact: bool) -> Iterator[tuple[str, Entry]]:
    """Slots that some table calls so; else those whose last word is the same, in a part of the layer that may be."""
    around, _, word = stem.lower().rpartition(".")
    is_attention, is_mlp = "att" in around, any(w in around for w in ("mlp", "ff", "feed"))
    for table in tables:
        for slot, entry in table.slots.items():
            known, part = stem_of(entry), slot.partition(".")[0]
            is_apart = (part == "attn" and is_mlp) or (part == "mlp" and is_attention)
            if known == stem if exact else known.rpartition(".")[2].lower() == word and not is_apart:
                yield slot, entry


def _outer_like(headers: Headers, names: Names, tables: Sequence[Names]) -> Names:
    """The table with what is called otherwise outside the layers; told by shapes where no table knows it."""
    found, claimed = dict(_outer(names)), set(_outer(names).values())
    for slot, own in _outer(names).items():
        if own in headers.outer:
            continue
        known = [stem for table in tables for s, stem in _outer(table).items() if s == slot]
        words = {stem.rpartition(".")[2] for stem in known}
        rank = 1 if slot.endswith("norm") else 2
        free = {s: headers.weight(s) for s in headers.outer if s not in claimed and len(headers.weight(s)) == rank}
        called = [s for s in free if s in known] or [s for s in free if s.rpartition(".")[2] in words]
        if not called and slot in ("embed", "final_norm"):
            called = sorted(free, key=lambda s: free[s], reverse=True)
        found[slot] = called[0] if called else own
        claimed.add(found[slot])
    more = {slot: found[slot] for slot in names.outer}
    return replace(names, embed=found["embed"], final_norm=found["final_norm"], head=found["head"], outer=more)


def _outer(names: Names) -> Mapping[str, str]:
    return {"head": names.head, "embed": names.embed, "final_norm": names.final_norm, **names.outer}


def _with_orientation(headers: Headers, names: Names) -> Names:
    """Matrices stored [in, out], or not, as the last one of the MLP is, where it is not square."""
    hidden, down = headers.weight(names.embed)[-1:], headers.weight(stem_of(names.slots.get("mlp.down", "")))
    if len(down) != 2 or down[0] == down[1]:
        return names
    is_transposed, slots = down[1:] == hidden, {}
    for slot, entry in names.slots.items():
        plain = entry.stored if isinstance(entry, Transposed) else entry
        is_matrix = len(headers.weight(stem_of(entry))) == 2
        slots[slot] = entry if not is_matrix else Transposed(plain) if is_transposed else plain
    return replace(names, slots=slots)
