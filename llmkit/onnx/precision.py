"""Which matrices of an export are computed from integers: those that already are, and those that shall be rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.architecture.keys import as_bool
from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, SpecError, listing
from llmkit.onnx.grids import Grids
from llmkit.onnx.nbits import BLOCKS, NBits, columns_of, rounded, taken, unit_rows
from llmkit.onnx.rounding import ACCURACY_LEVELS, AUTO_GROUPS, Rounding
from llmkit.quantization.schemes import Scheme
from llmkit.tensors.codes import codes_of, decoded_from, is_decoded
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.tensors.spec import DType
from llmkit.transforms.quantize import matches, must_match

__all__ = ["Rounding", "choose_grids", "restored"]


@dataclass
class _Chosen:
    matrices: dict[str, NBits] = field(default_factory=dict)
    kept: list[NBits] = field(default_factory=list)
    to_round: dict[str, tuple[Slot, Lazy]] = field(default_factory=dict)
    widened: dict[str, str] = field(default_factory=dict)  # name: what it is stored as
    rounded_again: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)  # why: names of matrices


def choose_grids(
    ckpt: Checkpoint, model: Model, asked: Rounding, *, scale_dtype: DType, provider: str
) -> tuple[Grids, list[str]]:
    """The matrices on integer grids, and what to tell of them.

    Args:
        ckpt: with float tensors, which remember their codes (`llmkit.tensors.codes`).
        scale_dtype: of new scales: the compute dtype.
        provider: what the graph is for: cpu or cuda.

    Raises:
        InputError: bits, a group size or an accuracy level that the kernels do not have; nothing to apply options to.
        SpecError: a glob that matches nothing, nothing left to round.
    """
    asked.refuse_unknown()
    ends = asked.bits_of_ends(provider)
    head = model.slots["head.weight"].name if "head.weight" in model.slots else ""
    for glob in (*asked.keep, *asked.only):
        must_match(ckpt, glob)
    chosen = _Chosen()
    for slot in model.slots.values():
        if slot.name in ckpt.tensors and len(slot.shape) == 2 and not (slot.kind == "head" and model.is_tied):
            _sort(chosen, slot, model, ckpt.tensors[slot.name], asked, provider)
    if asked.bits is None and not chosen.matrices and (asked.keep or asked.only or asked.symmetric is not None):
        raise InputError(f"{ckpt.label} has float weights, which nothing rounds", hint="give --bits 4 or --bits 8")
    if asked.bits is not None and not chosen.matrices and not chosen.to_round:
        raise SpecError(
            f"{ckpt.label}: nothing is left to quantize (only: {listing(asked.only) or 'all linear layers'}; keep: "
            f"{listing(asked.keep) or 'nothing'})",
            hint=f"name linear layers, such as {_example(model)}",
        )
    notes = _notes_of_kept(chosen, scale_dtype)
    if asked.bits is not None:
        notes += _round(chosen, asked, asked.bits, ends or asked.bits, scale_dtype)
    if head in chosen.matrices and as_bool(model.head.normalized):
        chosen.matrices[head] = unit_rows(chosen.matrices[head])
    level = asked.level(provider)
    if chosen.matrices:
        notes.append(f"MatMulNBits computes in {ACCURACY_LEVELS[level]} (accuracy level {level})")
        if provider == "cpu" and level != 4 and any(m.bits == 8 for m in chosen.matrices.values()):
            notes.append("8 bits at this level are slow on the CPU: every call restores the matrix (use level 4)")
    order = [s.name for s in model.slots.values() if s.name in chosen.matrices]
    if asked.is_qdq:
        left = [name for name in order if columns_of(chosen.matrices[name]) is None]
        if left:
            notes.append(f"{len(left)} matrices have no QDQ form and stay operators on integers ({listing(left, 2)})")
    return Grids({name: chosen.matrices[name] for name in order}, level, asked.is_qdq), notes


def restored(tensors: Mapping[str, Lazy], model: Model, grids: Grids) -> dict[str, Lazy]:
    """The tensors with every matrix on a grid as the float32 one that its integers stand for."""
    transposed = {s.name for s in model.slots.values() if s.is_transposed}
    found = dict(tensors)
    for name, matrix in grids.matrices.items():
        found[name] = transpose(matrix.restored()) if name in transposed else matrix.restored()
    return found


def _is_table(slot: Slot) -> bool:
    return slot.id == "embed.weight"


def _is_end(slot: Slot) -> bool:
    return slot.kind == "head" or _is_table(slot)


def _why_left(slot: Slot, model: Model, columns: int, asked: Rounding) -> str | None:
    """Why no grid takes a matrix, whatever bits are asked for; None where one does."""
    if matches(slot.name, asked.keep):
        return "--keep"
    if asked.only and not matches(slot.name, asked.only):
        return "--only"
    if slot.kind != "linear" and not _is_end(slot):
        return "looked up or multiplied element by element"
    if _is_table(slot) and model.is_tied and as_bool(model.head.normalized):
        return "its rows are normalized for the head alone"
    if _is_table(slot) and all(columns % block for block in BLOCKS):
        return f"no block divides its rows of {columns}"
    return None


def _sort(chosen: _Chosen, slot: Slot, model: Model, lazy: Lazy, asked: Rounding, provider: str) -> None:
    """Put a matrix where it belongs: kept on its grid, to be rounded, or left."""
    bits = asked.bits_of_ends(provider) if _is_end(slot) else asked.bits
    if slot.is_transposed:
        lazy = transpose(lazy)
    why = _why_left(slot, model, lazy.shape[1], asked)
    codes = codes_of(lazy) if why is None else None
    if codes is not None and (asked.bits is None or (bits is not None and codes.bits <= bits)):
        found = taken(codes, is_table=_is_table(slot))
        if found is not None and not (_is_table(slot) and codes.columns % found.block):
            chosen.matrices[slot.name] = found
            chosen.kept.append(found)
            return
    if why is None and bits is not None:
        chosen.to_round[slot.name] = (slot, lazy)
        if is_decoded(lazy):
            chosen.rounded_again.append(slot.name)
    elif is_decoded(lazy):
        chosen.widened[slot.name] = decoded_from(lazy)
    else:
        why = why or asked.why_float_ends(provider)
        chosen.left.setdefault(str(why), []).append(slot.name)


def _round(chosen: _Chosen, asked: Rounding, bits: int, ends: int, scale_dtype: DType) -> list[str]:
    """Round what is to be rounded, and say so."""
    scheme, reason = _scheme(bits, asked, chosen.to_round)
    n_layers, schemes = 0, {}
    for name, (slot, lazy) in chosen.to_round.items():
        own = asked.scheme(ends, scheme.group_size) if _is_end(slot) else scheme
        if _is_table(slot):
            own = _of_table(own, lazy)
        chosen.matrices[name] = rounded(name, lazy, own, scale_dtype, is_table=_is_table(slot))
        if _is_end(slot):
            schemes[name] = own
        else:
            n_layers += 1
    notes = [f"{n_layers} matrices to {scheme}{reason}, rounded to nearest"] if n_layers else []
    notes += [f"{name} to {own}" for name, own in schemes.items()]
    left = [f"{listing(names, 2)} ({why})" for why, names in chosen.left.items() if why != "--only"]
    return notes + ([f"matrices left in floats: {'; '.join(left)}"] if left else [])


def _notes_of_kept(chosen: _Chosen, scale_dtype: DType) -> list[str]:
    notes = []
    if chosen.kept:
        kinds = listing(dict.fromkeys(m.described for m in chosen.kept))
        notes.append(f"{len(chosen.kept)} matrices stay on the grid that they are stored on ({kinds}), bit for bit")
        finer = [m for m in chosen.kept if m.scales.dtype.bits > scale_dtype.bits]
        if finer:  # MatMulNBits and GatherBlockQuantized have one type for scales, offsets and activations
            notes.append(
                f"{len(finer)} of them have finer scales than {scale_dtype.torch_name}, in which the operators take "
                "them: those are rounded to it (--dtype float32 keeps them)"
            )
    if chosen.widened:
        one = len(chosen.widened) == 1
        types = [f"{n} {kind}" for kind, n in Counter(chosen.widened.values()).items()]
        notes.append(
            f"{len(chosen.widened)} quantized {'matrix becomes' if one else 'matrices become'} floats "
            f"({', '.join(types)}: {listing(list(chosen.widened), 2)}): MatMulNBits has no such grid"
        )
    if chosen.rounded_again:
        notes.append(
            f"{len(chosen.rounded_again)} matrices were on another grid ({listing(chosen.rounded_again, 2)}) and are "
            "rounded a second time"
        )
    return notes


def _example(model: Model) -> str:
    found = next((s.name for s in model.slots.values() if s.kind == "linear"), "lm_head.weight")
    return found.removesuffix(".weight")


def _scheme(bits: int, asked: Rounding, matrices: Mapping[str, tuple[Slot, Lazy]]) -> tuple[Scheme, str]:
    """The scheme of what is rounded, and in words why an automatic group size was taken."""
    size = asked.group_size
    if size == "channel":
        return asked.scheme(bits, None), ""
    if size != "auto":
        return asked.scheme(bits, size), ""
    rows = {name: lazy.shape[1] for name, (slot, lazy) in matrices.items() if not _is_table(slot)}
    sizes = AUTO_GROUPS[bits]
    for group in sizes:
        odd = [name for name, n in rows.items() if n % group]
        if not odd:
            larger = next((g for g in sizes[::-1] if g > group and any(n % g for n in rows.values())), None)
            name = next((name for name, n in rows.items() if larger and n % larger), "")
            why = f" ({larger} does not divide: {name} has rows of {rows[name]})" if larger else ""
            return asked.scheme(bits, group), why
    filled = next(name for name, n in rows.items() if n % sizes[-1])
    return asked.scheme(bits, sizes[-1]), f" (rows of {rows[filled]} are filled up: {filled})"


def _of_table(scheme: Scheme, lazy: Lazy) -> Scheme:
    """GatherBlockQuantized has whole blocks only."""
    columns, size = lazy.shape[1], scheme.group_size
    if size is None or columns % size == 0:
        return scheme
    fitting = [b for b in BLOCKS if columns % b == 0 and b < size] or [b for b in BLOCKS if columns % b == 0]
    return Scheme(scheme.bits, fitting[-1], scheme.is_symmetric)
