"""Conversion between stored tensors and the weights of the kinds: a tensor holds one, several, or a transposed one.

Every weight is a lazy expression over what is stored and the other way round, so that any two spellings of one
architecture (see `Model.spelled`) are converted by taking the weights out of one and putting them into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.model import Model
from llmkit.architecture.names import EXPERT, Names
from llmkit.architecture.positions import Rope
from llmkit.architecture.slots import Slot
from llmkit.errors import SpecError, listing
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.moving import Concat, Stack, TakeRows
from llmkit.tensors.rearrange import gather_rows, permute_blocks, transpose, view_as

_IN_MEMORY: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def parts_of(lazy: Lazy, slot: Slot) -> dict[str, Lazy]:
    """The weights in a stored tensor: id (`layers.3.attn.q.weight`) -> [out, in]."""
    if slot.stack:
        return {k: w for i in range(slot.stack) for k, w in parts_of(_of_stack(lazy, i), slot.of_stack(i)).items()}
    if slot.is_transposed:
        lazy = transpose(lazy)
    if len(slot.parts) == 1:
        return {slot.parts[0].id: lazy}
    groups, n_parts = slot.groups, len(slot.parts)
    if groups > 1 and groups == slot.parts[0].shape[0]:  # single rows in turn
        lazy, groups = permute_blocks(lazy, _order(groups, n_parts), op="rows apart"), 1
    sizes = [part.shape[0] // groups for part in slot.parts]
    period = sum(sizes)
    parts, start = {}, 0
    for part, size in zip(slot.parts, sizes, strict=True):
        runs = [(0, g * period + start, g * period + start + size) for g in range(groups)]
        parts[part.id] = gather_rows([lazy], runs)
        start += size
    return parts


def part_of(lazy: Lazy, slot: Slot, id: str) -> Lazy:
    """One of the weights in a stored tensor."""
    if slot.stack:
        index = next(i for i, part in enumerate(slot.parts) if part.id == id) * slot.stack // len(slot.parts)
        lazy, slot = _of_stack(lazy, index), slot.of_stack(index)
    return parts_of(lazy, slot)[id]


def stored(weights: Mapping[str, Lazy], slot: Slot) -> Lazy:
    """The tensor to store for a slot, from weights by id."""
    if slot.stack:
        return Stack([stored(weights, slot.of_stack(i)) for i in range(slot.stack)]).output()
    parts = [weights[part.id] for part in slot.parts]
    if len(parts) == 1:
        tensor = parts[0]
    elif slot.groups > 1 and slot.groups == slot.parts[0].shape[0]:
        tensor = permute_blocks(Concat(parts).output(), _order(len(parts), slot.groups), op="rows in turn")
    else:
        runs = [
            (i, g * part.rows, (g + 1) * part.rows) for g in range(slot.groups) for i, part in enumerate(slot.parts)
        ]
        tensor = gather_rows(parts, runs)
    return transpose(tensor) if slot.is_transposed else tensor


@lru_cache
def _order(rows: int, columns: int) -> tuple[int, ...]:
    """The order in which a table of `rows` by `columns` items is read by columns."""
    return tuple(row * columns + column for column in range(columns) for row in range(rows))


def _of_stack(lazy: Lazy, index: int) -> Lazy:
    """[n, rows, …] -> [rows, …], the matrix of that index."""
    n, rows, *rest = lazy.shape
    if isinstance(lazy.node, Stack):
        return lazy.node.inputs[index]
    if isinstance(lazy.node, Read) and lazy.node.strides is None:
        return gather_rows([view_as(lazy, lazy.dtype, (n * rows, *rest))], [(0, index * rows, (index + 1) * rows)])
    return view_as(TakeRows(lazy, index, index + 1).output(), lazy.dtype, (rows, *rest))


def single_experts(tensors: Mapping[str, Lazy], names: Names) -> dict[str, Lazy]:
    """The tensors with experts one by one, where the family has them so and files as transformers 5 has them in memory.

    That is, all of a layer in `….experts.gate_up_proj` [n, 2 * width, hidden] and `….experts.down_proj` [n, hidden,
    width].
    """
    entries = {part: names.slots.get(f"mlp.experts.{EXPERT}.{part}") for part in ("gate", "up", "down")}
    single = {part: entry.split(f".{EXPERT}.") for part, entry in entries.items() if isinstance(entry, str)}
    if len(single) < len(entries) or all(len(lazy.spec.shape) < 3 for lazy in tensors.values()):
        return dict(tensors)
    found: dict[str, Lazy] = {}
    for name, lazy in tensors.items():
        stem, _, leaf = name.rpartition(".")
        parts = _IN_MEMORY.get(leaf, ()) if len(lazy.shape) == 3 else ()
        if not parts or not stem.endswith(single[parts[0]][0]):
            found[name] = lazy
            continue
        for e in range(lazy.shape[0]):
            matrix, rows = _of_stack(lazy, e), lazy.shape[1] // len(parts)
            for i, part in enumerate(parts):
                weight = gather_rows([matrix], [(0, i * rows, (i + 1) * rows)])
                found[f"{stem}.{e}.{single[part][1]}.weight"] = weight
    return found


def weights_of(tensors: Mapping[str, Lazy], model: Model) -> dict[str, Lazy]:
    """All weights of a checkpoint by id, fused ones taken apart; buffers that nothing needs are left out.

    Raises:
        SpecError: the tensors do not fit the model.
    """
    report = model.check({name: lazy.spec for name, lazy in tensors.items()})
    if report.problems:
        raise SpecError(f"the tensors do not fit the config: {listing(report.problems, 3)}")
    weights: dict[str, Lazy] = {}
    for slot in model.slots.values():
        if slot.name in tensors:
            weights |= parts_of(tensors[slot.name], slot)
    return weights


def tensors_of(weights: Mapping[str, Lazy], model: Model) -> dict[str, Lazy]:
    """The tensors to store, by name, from weights by id.

    Raises:
        SpecError: a weight that the model needs is absent, or there is one that it does not have.
    """
    missing = [
        w for s in model.slots.values() if not s.is_optional for w in (p.id for p in s.parts) if w not in weights
    ]
    extra = [w for w in weights if w not in model.stored_in]
    if missing or extra:
        what = f"lacks {listing(missing, 3)}" if missing else f"has no place for {listing(extra, 3)}"
        raise SpecError(f"the model to write {what}")
    slots = [s for s in model.slots.values() if all(p.id in weights for p in s.parts)]
    return {slot.name: stored(weights, slot) for slot in slots}


def respelled(tensors: Mapping[str, Lazy], model: Model, names: Names) -> dict[str, Lazy]:
    """The tensors of a checkpoint in other names of its model: what they store otherwise is stored so, the rest stays.

    Args:
        model: as the tensors have it, quantized ones as floats; those that it does not know stay as well.
    """
    other = model.spelled(names)
    moved = {s.name: s for s in model.slots.values() if s.name in tensors and s.name not in other.tensors()}
    weights = {id: part for name, slot in moved.items() for id, part in parts_of(tensors[name], slot).items()}
    made = [s for s in other.slots.values() if s.name not in tensors and all(part.id in weights for part in s.parts)]
    used = {part.id for slot in made for part in slot.parts}
    kept = {n: t for n, t in tensors.items() if n not in moved or used.isdisjoint(p.id for p in moved[n].parts)}
    return kept | {slot.name: stored(weights, slot) for slot in made}


def rotary_pairs(weights: Mapping[str, Lazy], model: Model, *, to: str) -> dict[str, Lazy]:
    """The same weights with the rows of q and k (and their biases) reordered so that rotary pairs lie as `to` says.

    Args:
        weights: by id, in the other order.
        model: its layers' `Rope` says how many dims of each head turn; layers without one stay.
        to: `half` (dim j turns with j + R/2) or `interleaved` (2j with 2j + 1).
    """
    changed = dict(weights)
    for i, block in enumerate(model.blocks):
        position = getattr(block, "position", None)
        if not isinstance(position, Rope):
            continue
        size = model.dims.evaluate(position.size)
        rotated = position.rotated(size)
        attention = getattr(block, "attention", None)
        widths = (
            attention.rotary_widths(model.dims) if isinstance(attention, LatentAttention) else {"q": size, "k": size}
        )
        half = rotated // 2
        if to == "half":
            order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, size)]
        else:
            order = [j for pair in zip(range(half), range(half, rotated), strict=True) for j in pair]
            order += range(rotated, size)
        for layer, width in widths.items():
            before = width - size
            rows = [*range(before), *(before + j for j in order)]
            for name in (f"layers.{i}.attn.{layer}.weight", f"layers.{i}.attn.{layer}.bias"):
                if name in changed:
                    changed[name] = permute_blocks(changed[name], rows, op=f"rotary {to}")
    return changed


def normalized_rows(weight: Lazy) -> Lazy:
    """A head whose rows are divided by their norms, as the original does at run time (`Head.normalized`)."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)

    return Apply("row / norm", [weight], weight.spec, fn, scratch=2.0).output()
