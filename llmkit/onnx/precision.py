"""Which matrices of an export are computed from integers: those that already are, and those that shall be rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.architecture.keys import as_bool
from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, SpecError, listing
from llmkit.onnx.grids import Grids
from llmkit.onnx.nbits import BLOCKS, NBits, columns_of, rounded, taken
from llmkit.quantization.schemes import GROUP_SIZES, Scheme
from llmkit.tensors.codes import codes_of, decoded_from, is_decoded
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.tensors.spec import DType
from llmkit.transforms.quantize import GroupSize, matches, must_match

__all__ = ["ACCURACY_LEVELS", "Rounding", "choose_grids", "restored"]

# What MatMulNBits computes products in. With 0 and 1 the CPU's kernel for 8 bits restores the whole matrix in each call
# (350 times the time of level 4, measured at one token), and that for 4 bits takes 4 times as long.
ACCURACY_LEVELS = {0: "the dtype of activations", 1: "float32", 4: "int8 activations"}


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is asked of weights on integer grids.

    Attributes:
        bits: 4 or 8: round the linear layers; None: only keep what the checkpoint has on grids already.
        group_size: columns that share a scale: 16 to 256, "channel" for one scale a row, or "auto": the largest of
            128, 64, 32 that divides every row.
        symmetric: no zero points.
        keep, only: globs of tensors or modules, as of `llmkit quantize`.
        embedding: round the embedding and the head, too.
        accuracy_level: of MatMulNBits (`ACCURACY_LEVELS`); None: 4 for the CPU.
        is_qdq: DequantizeLinear and MatMul, of which ONNX Runtime makes MatMulNBits when it loads them.
    """

    bits: int | None = None
    group_size: GroupSize = "auto"
    symmetric: bool = True
    keep: Sequence[str] = ()
    only: Sequence[str] = ()
    embedding: bool = False
    accuracy_level: int | None = None
    is_qdq: bool = False

    def attrs(self) -> dict[str, Any]:
        """What was asked, for the history; empty for nothing."""
        asked = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        asked |= {"embedding": self.embedding, "qdq": self.is_qdq}
        return (asked if self.bits is not None else {}) | {
            name: list(globs) for name, globs in (("keep", self.keep), ("only", self.only)) if globs
        }


@dataclass
class _Chosen:
    matrices: dict[str, NBits] = field(default_factory=dict)
    kept: list[NBits] = field(default_factory=list)
    to_round: dict[str, tuple[Slot, Lazy]] = field(default_factory=dict)
    widened: dict[str, str] = field(default_factory=dict)  # name: what it is stored as
    rounded_again: list[str] = field(default_factory=list)


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
    _refuse_unknown(asked)
    for glob in (*asked.keep, *asked.only):
        must_match(ckpt, glob)
    chosen = _Chosen()
    for slot in model.slots.values():
        if slot.name in ckpt.tensors and _is_matrix(slot, model) and not matches(slot.name, asked.keep):
            _sort(chosen, slot, ckpt.tensors[slot.name], asked)
    if asked.bits is None and not chosen.matrices and (asked.keep or asked.only or not asked.symmetric):
        raise InputError(f"{ckpt.label} has float weights, which nothing rounds", hint="give --bits 4 or --bits 8")
    if asked.bits is not None and not chosen.matrices and not chosen.to_round:
        raise SpecError(
            f"{ckpt.label}: nothing is left to quantize (only: {listing(asked.only) or 'all linear layers'}; keep: "
            f"{listing(asked.keep) or 'nothing'})",
            hint=f"name linear layers, such as {_example(model)}",
        )
    notes = _notes_of_kept(chosen)
    if asked.bits is not None and chosen.to_round:
        scheme, reason = _scheme(asked.bits, asked, chosen.to_round)
        for name, (slot, lazy) in chosen.to_round.items():
            own = _of_table(scheme, slot, lazy) if _is_table(slot) else scheme
            chosen.matrices[name] = rounded(name, lazy, own, scale_dtype, is_table=_is_table(slot))
        notes.append(f"{len(chosen.to_round)} matrices to {scheme}{reason}, rounded to nearest")
    level = asked.accuracy_level if asked.accuracy_level is not None else 4 if provider == "cpu" else 0
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


def _refuse_unknown(asked: Rounding) -> None:
    if asked.bits not in (None, 4, 8):
        raise InputError(f"--bits {asked.bits}: expected 4 or 8", hint="--bits 4 or --bits 8")
    if asked.group_size not in ("auto", "channel", *BLOCKS):
        sizes = ", ".join(map(str, BLOCKS))
        raise InputError(f"--group-size {asked.group_size}: expected {sizes}, channel or auto", hint="--group-size 64")
    if asked.accuracy_level not in (None, *ACCURACY_LEVELS):
        levels = ", ".join(f"{level} ({what})" for level, what in ACCURACY_LEVELS.items())
        raise InputError(f"--accuracy-level {asked.accuracy_level}: expected {levels}", hint="--accuracy-level 4")
    if asked.bits is None and (asked.embedding or asked.group_size != "auto"):
        what = "--quantize-embedding" if asked.embedding else "--group-size"
        raise InputError(f"{what} says nothing without --bits", hint="give --bits 4 or --bits 8, too")


def _is_matrix(slot: Slot, model: Model) -> bool:
    """Linear layers, the embedding, and a head of its own whose rows are used as they are stored."""
    if slot.kind == "head":
        return len(slot.shape) == 2 and not model.is_tied and not as_bool(model.head.normalized)
    return len(slot.shape) == 2 and (slot.kind == "linear" or _is_table(slot))


def _is_table(slot: Slot) -> bool:
    return slot.id == "embed.weight"


def _sort(chosen: _Chosen, slot: Slot, lazy: Lazy, asked: Rounding) -> None:
    """Put a matrix where it belongs: kept on its grid, to be rounded, or left."""
    if slot.is_transposed:
        lazy = transpose(lazy)
    if asked.only and not matches(slot.name, asked.only):
        is_wanted, may_keep = False, False
    else:
        is_wanted, may_keep = bool(asked.only) or slot.kind == "linear" or asked.embedding, True
    codes = codes_of(lazy)
    if codes is not None and may_keep and asked.bits in (None, codes.bits):
        found = taken(codes, is_table=_is_table(slot))
        if found is not None and not (_is_table(slot) and codes.columns % found.block):
            chosen.matrices[slot.name] = found
            chosen.kept.append(found)
            return
    if asked.bits is not None and is_wanted:
        if _is_table(slot) and all(lazy.shape[1] % block for block in BLOCKS):
            raise SpecError(
                f"{slot.name}: no block size divides its rows of {lazy.shape[1]}", hint="leave it in floats"
            )
        chosen.to_round[slot.name] = (slot, lazy)
        if is_decoded(lazy):
            chosen.rounded_again.append(slot.name)
    elif is_decoded(lazy):
        chosen.widened[slot.name] = decoded_from(lazy)


def _notes_of_kept(chosen: _Chosen) -> list[str]:
    notes = []
    if chosen.kept:
        kinds = listing(dict.fromkeys(m.described for m in chosen.kept))
        notes.append(f"{len(chosen.kept)} matrices stay on the grid that they are stored on ({kinds}), bit for bit")
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
        return Scheme(bits, None, asked.symmetric), ""
    if size != "auto":
        return Scheme(bits, size, asked.symmetric), ""
    rows = {name: lazy.shape[1] for name, (slot, lazy) in matrices.items() if not _is_table(slot)}
    for group in GROUP_SIZES[::-1]:
        odd = [name for name, n in rows.items() if n % group]
        if not odd:
            larger = next((g for g in GROUP_SIZES if g > group and any(n % g for n in rows.values())), None)
            name = next((name for name, n in rows.items() if larger and n % larger), "")
            why = f" ({larger} does not divide: {name} has rows of {rows[name]})" if larger else ""
            return Scheme(bits, group, asked.symmetric), why
    filled = next(name for name, n in rows.items() if n % GROUP_SIZES[0])
    return Scheme(bits, GROUP_SIZES[0], asked.symmetric), f" (rows of {rows[filled]} are filled up: {filled})"


def _of_table(scheme: Scheme, slot: Slot, lazy: Lazy) -> Scheme:
    """GatherBlockQuantized has whole blocks only."""
    columns, size = lazy.shape[1], scheme.group_size
    if size is None or columns % size == 0:
        return scheme
    fitting = [b for b in BLOCKS if columns % b == 0 and b < size] or [b for b in BLOCKS if columns % b == 0]
    return Scheme(scheme.bits, fitting[-1], scheme.is_symmetric)
