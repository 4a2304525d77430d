"""Which matrices of an export are computed from integers: those that already are, and those that shall be rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmkit.architecture.keys import as_bool
from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, SpecError, listing
from llmkit.onnx.grids import Grids, Integers
from llmkit.onnx.rounding import ACCURACY_LEVELS, Rounding
from llmkit.quantization.codecs.nbits import CODEC
from llmkit.quantization.matrix import Grid, QuantizedMatrix, dequantized_from, is_dequantized, matrix_of
from llmkit.quantization.method import method_named, quantized
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.tensors.spec import DType
from llmkit.transforms.layers import choose_grid, nothing_left, why_left

if TYPE_CHECKING:
    import torch

__all__ = ["Rounding", "choose_grids", "restored"]


@dataclass
class _Chosen:
    """Matrices by what becomes of them.

    Attributes:
        integers: computed from integers; `kept` are those that were before.
        to_round: floats that become integers.
        widened: what it is stored as, of quantized matrices that become floats.
        rounded_again: of `to_round`, those that are on another grid.
        left: why matrices stay in floats: their names.
    """

    integers: dict[str, Integers] = field(default_factory=dict)
    kept: list[QuantizedMatrix] = field(default_factory=list)
    to_round: dict[str, tuple[Slot, Lazy]] = field(default_factory=dict)
    widened: dict[str, str] = field(default_factory=dict)
    rounded_again: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)


def choose_grids(
    ckpt: Checkpoint, model: Model, asked: Rounding, *, scale_dtype: DType, provider: str
) -> tuple[Grids, list[str]]:
    """The matrices on integer grids, and what to tell of them.

    Args:
        ckpt: with float tensors, which remember their codes (`llmkit.quantization.matrix`).
        scale_dtype: of new scales: the compute dtype.
        provider: what the graph is for: cpu or cuda.

    Raises:
        InputError: an accuracy level that the kernels do not have; options that nothing applies to.
        SpecError: bits or a group size that they do not have, a glob that matches nothing, nothing left to round.
    """
    asked.refuse_unknown()
    ends = asked.bits_of_ends(provider)
    head = model.slots["head.weight"].name if "head.weight" in model.slots else ""
    chosen, slots = _Chosen(), model.tensors()
    for name, why in why_left(ckpt, model, asked.keep, asked.only, has_tables=True).items():
        _sort(chosen, slots[name], model, ckpt.tensors[name], asked, provider, why)
    if asked.bits is None and not chosen.integers and (asked.keep or asked.only or asked.symmetric is not None):
        raise InputError(f"{ckpt.label} has float weights, which nothing rounds", hint="give --bits 4 or --bits 8")
    if asked.bits is not None and not chosen.integers and not chosen.to_round:
        raise nothing_left(ckpt, model, asked.keep, asked.only)
    notes = _notes_of_kept(chosen, scale_dtype)
    if asked.bits is not None:
        notes += _round(chosen, asked, asked.bits, ends or asked.bits, scale_dtype)
    integers = chosen.integers
    if head in integers and as_bool(model.head.normalized):
        integers[head] = replace(integers[head], matrix=_unit_rows(integers[head].matrix))
    level = asked.level(provider)
    if integers:
        notes.append(f"MatMulNBits computes in {ACCURACY_LEVELS[level]} (accuracy level {level})")
        if provider == "cpu" and level != 4 and any(m.bits == 8 for m in integers.values()):
            notes.append("8 bits at this level are slow on the CPU: every call restores the matrix (use level 4)")
    order = [s.name for s in model.slots.values() if s.name in integers]
    if asked.is_qdq:
        left = [name for name in order if integers[name].columns is None]
        if left:
            notes.append(f"{len(left)} matrices have no QDQ form and stay operators on integers ({listing(left, 2)})")
    return Grids({name: integers[name] for name in order}, level, asked.is_qdq), notes


def restored(tensors: Mapping[str, Lazy], model: Model, grids: Grids) -> dict[str, Lazy]:
    """The tensors with every matrix on a grid as the float32 one that its integers stand for."""
    transposed = {s.name for s in model.slots.values() if s.is_transposed}
    found = dict(tensors)
    for name, integers in grids.matrices.items():
        floats = integers.matrix.dequantized(DType.F32)
        found[name] = transpose(floats) if name in transposed else floats
    return found


def _unit_rows(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same codes with scales that make every row one of length 1, for heads that divide rows by their norms.

    The grid is that of the rows as they were: rounding to nearest does not depend on their length.
    """
    floats = matrix.dequantized(DType.F32)

    def fn(rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
        return part.double().div_(lengths.clamp_(min=1e-12)).float()

    def divided(part: Lazy) -> Lazy:
        wide = part.cast(DType.F32)
        return Apply("row / norm", [floats, wide], wide.spec, fn, scratch=4.0).output()

    offsets = divided(matrix.offsets) if matrix.offsets is not None else None
    return replace(matrix, scales=divided(matrix.scales), offsets=offsets)


def _is_table(slot: Slot) -> bool:
    return slot.id == "embed.weight"


def _is_end(slot: Slot) -> bool:
    return slot.kind == "head" or _is_table(slot)


def _why_no_table(model: Model, columns: int) -> str | None:
    """Why the embedding cannot be looked up in integers; None where it can."""
    if model.is_tied and as_bool(model.head.normalized):
        return "its rows are normalized for the head alone"
    if all(columns % block for block in CODEC.group_sizes):
        return f"no block divides its rows of {columns}"
    return None


def _sort(
    chosen: _Chosen, slot: Slot, model: Model, lazy: Lazy, asked: Rounding, provider: str, why: str | None
) -> None:
    """Put a matrix where it belongs: kept on its grid, to be rounded, or left, where there is a reason why."""
    bits = asked.bits_of_ends(provider) if _is_end(slot) else asked.bits
    if slot.is_transposed:
        lazy = transpose(lazy)
    why = why or (_why_no_table(model, lazy.shape[1]) if _is_table(slot) else None)
    matrix = matrix_of(lazy) if why is None else None
    found = CODEC.fitted(matrix) if matrix is not None else None
    if found is not None and _is_table(slot) and lazy.shape[1] % found.group:
        found = None  # GatherBlockQuantized has whole blocks only
    if found is not None and (asked.bits is None or (bits is not None and found.bits <= bits)):
        chosen.integers[slot.name] = Integers(found, _is_table(slot))
        chosen.kept.append(found)
        return
    if why is None and bits is not None:
        chosen.to_round[slot.name] = (slot, lazy)
        if is_dequantized(lazy):
            chosen.rounded_again.append(slot.name)
    elif is_dequantized(lazy):
        chosen.widened[slot.name] = dequantized_from(lazy)
    else:
        why = why or asked.why_float_ends(provider)
        chosen.left.setdefault(str(why), []).append(slot.name)


def _round(chosen: _Chosen, asked: Rounding, bits: int, ends: int, scale_dtype: DType) -> list[str]:
    """Round what is to be rounded, and say so."""
    rows = {name: lazy.shape[1] for name, (slot, lazy) in chosen.to_round.items() if not _is_table(slot)}
    grid, reason = choose_grid(CODEC, bits, asked.group_size, asked.symmetric, rows)
    method, n_layers, of_ends = method_named(asked.method), 0, {}
    for name, (slot, lazy) in chosen.to_round.items():
        own = replace(grid, bits=ends) if _is_end(slot) else grid
        if _is_table(slot):
            own = _of_table(own, lazy.shape[1])
        found = CODEC.fitted(quantized(lazy, method, own, scale_dtype, name=name))
        if found is None:
            raise SpecError(f"{name}: {own} does not divide into blocks of MatMulNBits", hint="--group-size 64")
        chosen.integers[name] = Integers(found, _is_table(slot))
        if _is_end(slot):
            of_ends[name] = own
        else:
            n_layers += 1
    notes = [f"{n_layers} matrices to {grid}{reason}, {method.words}"] if n_layers else []
    notes += [f"{name} to {own}" for name, own in of_ends.items()]
    left = [f"{listing(names, 2)} ({why})" for why, names in chosen.left.items() if why != "--only"]
    return notes + ([f"matrices left in floats: {'; '.join(left)}"] if left else [])


def _notes_of_kept(chosen: _Chosen, scale_dtype: DType) -> list[str]:
    notes = []
    if chosen.kept:
        kinds = listing(dict.fromkeys(str(m) for m in chosen.kept))
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


def _of_table(grid: Grid, columns: int) -> Grid:
    """GatherBlockQuantized has whole blocks only."""
    size = grid.group_size
    if size is None or columns % size == 0:
        return grid
    fitting = [b for b in CODEC.group_sizes if columns % b == 0]
    return replace(grid, group_size=([b for b in fitting if b < size] or fitting)[-1])
