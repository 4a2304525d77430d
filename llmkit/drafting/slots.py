"""Which slot each tensor of a checkpoint is, by the name tables of the plugins and by shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.names import Fused, Names, Transposed, stem_of
from llmkit.drafting.headers import Headers, Tensors
from llmkit.drafting.known import Entry, Known, likeness, outer_stems

__all__ = ["names_like", "other_side"]

_LEAST = 0.6  # how like a known stem an unknown one must be
_OWN = 1.0  # what the table that is tried first counts more


def names_like(headers: Headers, known: Known, like: Architecture) -> tuple[Names, dict[str, str]]:
    """The name table of a checkpoint, and what of it is not certain: slot -> why.

    Args:
        like: whose layers' weights they are; its own table is preferred where several know a name.
    """
    first, needed = like.names, known.layer_slots[like.name]
    entries = {slot: [e for e in known.inner[slot] if needed >= _stored_in(slot, e)] for slot in known.inner}
    inner = _assigned(headers.inner, entries, {slot: stem_of(e) for slot, e in first.slots.items()})
    outer = _assigned(headers.outer, known.outer, outer_stems(first))
    tables = {s: t["weight"][0] for s, t in headers.outer.items() if len(t.get("weight", ())) == 2 and s not in outer}
    if "embed" not in outer.values() and tables:
        outer[max(tables, key=lambda stem: tables[stem])] = "embed"
    by_slot = {slot: stem for stem, slot in outer.items()}
    checks: dict[str, str] = {}
    slots: dict[str, Entry] = {}
    order = list(known.inner)
    hidden = _hidden(headers, by_slot)
    is_transposed = _is_transposed(headers, {slot: stem for stem, slot in inner.items()}, hidden)
    for stem, slot in sorted(inner.items(), key=lambda item: order.index(item[1])):
        nearest = max(entries[slot], key=lambda e: likeness(stem, e) + _OWN * (e == first.slots.get(slot)))
        entry: Entry = nearest.stored if isinstance(nearest, Transposed) else nearest
        if isinstance(entry, Fused):
            checks[slot] = 'the order of rows (layout="stacked" or "per_group"), and of its parts'
        entry = replace(entry, name=stem) if isinstance(entry, Fused) else stem
        if is_transposed and len(headers.inner[stem].get("weight", ())) == 2:
            entry = Transposed(entry)
        if likeness(stem, nearest) < 1:
            checks[slot] = f"told by its name, which is like {stem_of(nearest)}"
        slots[slot] = entry
    return Names(
        embed=by_slot.pop("embed", ""),
        final_norm=by_slot.pop("final_norm", "final_norm"),
        head=by_slot.pop("head", "lm_head"),
        block=headers.block,
        slots=slots,
        outer=by_slot,
        ignored=headers.ignored,
    ), checks  # fmt: skip


def _stored_in(slot: str, entry: Entry) -> set[str]:
    """The stems of the weights that an entry stores."""
    fused = entry.stored if isinstance(entry, Transposed) else entry
    return {f"{slot.rpartition('.')[0]}.{part}" for part in fused.parts} if isinstance(fused, Fused) else {slot}


def _assigned(tensors: Tensors, known: Mapping[str, Sequence[Entry]], own: Mapping[str, str]) -> dict[str, str]:
    """Stem -> slot, each slot once, the likest pairs first."""
    pairs = []
    for stem, leaves in tensors.items():
        for slot, entries in known.items():
            around = _same_part(stem, slot)
            if entries and around >= 0 and _can_be(slot, leaves):
                alike = max(likeness(stem, entry) for entry in entries)
                pairs.append((alike + around + _OWN * (own.get(slot) == stem), stem, slot))
    found: dict[str, str] = {}
    for score, stem, slot in sorted(pairs, key=lambda pair: -pair[0]):
        if score >= _LEAST and stem not in found and slot not in found.values():
            found[stem] = slot
    return found


def _can_be(slot: str, leaves: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes allow it: norms are vectors, what is multiplied is a matrix."""
    is_vector = all(len(shape) == 1 for shape in leaves.values())
    return is_vector == slot.endswith("norm")


def _same_part(stem: str, slot: str) -> float:
    """Whether the modules around a tensor are those of the slot: -1 for the other half of a layer, 0 for unknown."""
    around, part = stem.lower().rpartition(".")[0], slot.partition(".")[0]
    is_attention, is_mlp = "att" in around, any(word in around for word in ("mlp", "ff", "feed"))
    if part not in ("attn", "mlp") or not (is_attention or is_mlp):
        return 0.0
    return 0.5 if (part == "attn") == is_attention else -1.0


def _hidden(headers: Headers, outer: Mapping[str, str]) -> int:
    """The width of hidden states: of the norm before the head, else of the embedding."""
    stem = outer.get("final_norm") or outer.get("embed", "")
    shapes = list(headers.outer.get(stem, {}).values())
    return shapes[0][-1] if shapes else 0


def _is_transposed(headers: Headers, inner: Mapping[str, str], hidden: int) -> bool:
    """Whether matrices are stored [in, out]: told by the last of the MLP, where it is not square."""
    down = headers.inner.get(inner.get("mlp.down", ""), {}).get("weight", ())
    return len(down) == 2 and down[1] == hidden != down[0]


def other_side(shape: tuple[int, ...], hidden: int) -> int:
    """The length of a matrix [out, in], or one stored [in, out], that is not the hidden one."""
    return shape[0] if shape[-1] == hidden else shape[-1]
