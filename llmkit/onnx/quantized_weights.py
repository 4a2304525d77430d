"""Which matrices of a graph are computed from integers: those that already are, and those that are quantized for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, SpecError, listing
from llmkit.lazy_imports import torch
from llmkit.onnx.integer_matrices import IntegerMatrices, IntegerMatrix, fits_experts
from llmkit.onnx.precision import ACCURACY_LEVELS, Precision
from llmkit.quantization.codecs.nbits import CODEC
from llmkit.quantization.matrix import Grid, QuantizedMatrix, dequantized_from, is_dequantized, matrix_of
from llmkit.quantization.method import Task, method_named, quantized
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.tensors.spec import DType
from llmkit.transforms.layers import choose_grid, exclusion_reasons, nothing_to_quantize


@dataclass
class _WeightPlan:
    """The matrices of a model by name, and what becomes of them.

    Attributes:
        kept: they stay on the grid that they are stored on.
        floats: matrices [out, in] that are to be quantized.
        widened: what quantized matrices are stored as that become floats.
        left: why matrices stay floats: their names.
    """

    kept: dict[str, IntegerMatrix] = field(default_factory=dict)
    floats: dict[str, Lazy] = field(default_factory=dict)
    widened: dict[str, str] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)


def choose_grids(
    ckpt: Checkpoint, model: Model, precision: Precision, *, scale_dtype: DType, provider: str
) -> tuple[IntegerMatrices, list[str]]:
    """The matrices on integer grids, and what to tell of them.

    Args:
        ckpt: with float tensors, which remember their codes (`llmkit.quantization.matrix`).
        scale_dtype: of new scales: the compute dtype.
        provider: what the graph is for: cpu or cuda.

    Raises:
        InputError: bits, a group size or an accuracy level that the kernels do not have; options that apply to nothing.
        SpecError: a glob that matches nothing, nothing left to quantize.
    """
    precision.refuse_unknown()
    plan = _plan_weights(ckpt, model, precision, provider)
    if (
        precision.bits is None
        and not plan.kept
        and (precision.keep or precision.only or precision.symmetric is not None)
    ):
        raise InputError(f"{ckpt.label} has float weights, which nothing rounds", hint="give --bits 4 or --bits 8")
    if precision.bits is not None and not plan.kept and not plan.floats:
        raise nothing_to_quantize(ckpt, model, precision.keep, precision.only)
    integers, notes = dict(plan.kept), _notes(plan, scale_dtype)
    if precision.bits is not None:
        new, more = _quantized(plan, model.tensors(), precision, provider, scale_dtype)
        integers |= new
        notes += more
    head = model.slots.get("head.weight")
    if head is not None and head.name in integers and model.head.is_normalized:
        integers[head.name] = replace(integers[head.name], matrix=_unit_rows(integers[head.name].matrix))
    level = precision.level(provider)
    if integers:
        notes.append(f"MatMulNBits computes in {ACCURACY_LEVELS[level]} (accuracy level {level})")
        if provider == "cpu" and level != 4 and any(m.bits == 8 for m in integers.values()):
            notes.append("8 bits at this level are slow on the CPU: every call restores the matrix (use level 4)")
    ordered = {slot.name: integers[slot.name] for slot in model.slots.values() if slot.name in integers}
    if precision.is_qdq:
        left = [name for name, matrix in ordered.items() if matrix.columns is None]
        if left:
            notes.append(f"{len(left)} matrices have no QDQ form and stay operators on integers ({listing(left, 2)})")
    return IntegerMatrices(ordered, level, precision.is_qdq), notes


def restored(tensors: Mapping[str, Lazy], model: Model, grids: IntegerMatrices) -> dict[str, Lazy]:
    """The tensors with every matrix on a grid as the float32 one that its integers stand for."""
    transposed = {s.name for s in model.slots.values() if s.is_transposed}
    floats = {name: integers.matrix.dequantized(DType.F32) for name, integers in grids.matrices.items()}
    return dict(tensors) | {name: transpose(x) if name in transposed else x for name, x in floats.items()}


def _unit_rows(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same codes with scales that make every row one of length 1, for heads that divide rows by their norms.

    The grid is that of the rows as they were: rounding to nearest does not depend on their length.
    """
    floats = matrix.dequantized(DType.F32)

    def fn(rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
        return part.double().div_(lengths.clamp_(min=1e-12)).float()

    def divided(part: Lazy) -> Lazy:
        wide = part.cast(DType.F32)
        return Apply("row / norm", [floats, wide], wide.spec, fn, scratch=4.0).output()

    offsets = divided(matrix.offsets) if matrix.offsets is not None else None
    return replace(matrix, scales=divided(matrix.scales), offsets=offsets)


def _is_table(slot: Slot) -> bool:
    return slot.id == "embed.weight"


def _plan_weights(ckpt: Checkpoint, model: Model, precision: Precision, provider: str) -> _WeightPlan:
    plan, slots = _WeightPlan(), model.tensors()
    for name, why in exclusion_reasons(ckpt, model, precision.keep, precision.only, has_tables=True).items():
        slot, lazy = slots[name], ckpt.tensors[name]
        lazy = transpose(lazy) if slot.is_transposed else lazy
        bits = precision.bits if slot.kind == "linear" else precision.bits_of_embedding(provider)
        if why is None and _is_table(slot):
            why = _why_no_table(model, lazy.shape[1])
        matrix = matrix_of(lazy) if why is None else None
        fitted = CODEC.in_blocks(matrix) if matrix is not None else None
        if fitted is not None and slot.is_of_expert and not fits_experts(fitted):
            fitted = None
        if why is None and slot.is_of_expert and bits == 8:
            why = "QMoE has no 8 bits with float activations on a CPU"
        if fitted is not None and _is_table(slot) and lazy.shape[1] % fitted.group:
            fitted = None  # GatherBlockQuantized has whole blocks only
        if fitted is not None and (precision.bits is None or (bits is not None and fitted.bits <= bits)):
            plan.kept[name] = IntegerMatrix(fitted, _is_table(slot))
        elif why is None and bits is not None:
            plan.floats[name] = lazy
        elif is_dequantized(lazy):
            plan.widened[name] = dequantized_from(lazy)
        else:
            plan.left.setdefault(str(why or precision.why_float_embedding(provider)), []).append(name)
    return plan


def _why_no_table(model: Model, columns: int) -> str | None:
    """Why the embedding cannot be looked up in integers; None where it can."""
    if model.is_tied and model.head.is_normalized:
        return "its rows are normalized for the head alone"
    if all(columns % block for block in CODEC.group_sizes):
        return f"no block divides its rows of {columns}"
    return None


def _quantized(
    plan: _WeightPlan, slots: Mapping[str, Slot], precision: Precision, provider: str, scale_dtype: DType
) -> tuple[dict[str, IntegerMatrix], list[str]]:
    """Quantize the planned matrices, with a note."""
    bits, method = precision.bits or 0, method_named(precision.method or "mse")
    rows = {name: lazy.shape[1] for name, lazy in plan.floats.items() if not _is_table(slots[name])}
    grid, reason = choose_grid(CODEC, bits, precision.group_size, precision.symmetric, rows)
    of_embedding = replace(grid, bits=precision.bits_of_embedding(provider) or bits)
    matrices, notes = {}, []
    for name, lazy in plan.floats.items():
        is_table, layer_grid = _is_table(slots[name]), grid if slots[name].kind == "linear" else of_embedding
        layer_grid = _of_table(layer_grid, lazy.shape[1]) if is_table else layer_grid
        fitted = CODEC.in_blocks(quantized(Task(lazy, method, layer_grid, scale_dtype, name)))
        if fitted is None:
            raise SpecError(f"{name}: MatMulNBits has no blocks for {layer_grid}", hint="--group-size 64")
        matrices[name] = IntegerMatrix(fitted, is_table)
        if slots[name].kind != "linear":
            notes.append(f"{name} to {layer_grid}")
    n_layers = len(matrices) - len(notes)
    if n_layers:
        notes.insert(0, f"{n_layers} matrices to {grid}{reason}, {method.words}")
    left = [f"{listing(names, 2)} ({why})" for why, names in plan.left.items() if why != "--only"]
    return matrices, notes + ([f"matrices left in floats: {'; '.join(left)}"] if left else [])


def _of_table(grid: Grid, columns: int) -> Grid:
    """GatherBlockQuantized has whole blocks only."""
    size = grid.group_size
    if size is None or columns % size == 0:
        return grid
    fitting = [b for b in CODEC.group_sizes if columns % b == 0]
    return replace(grid, group_size=([b for b in fitting if b < size] or fitting)[-1])


def _notes(plan: _WeightPlan, scale_dtype: DType) -> list[str]:
    """Notes about matrices that the checkpoint has quantized already."""
    notes, kept = [], [integers.matrix for integers in plan.kept.values()]
    if kept:
        kinds = listing(dict.fromkeys(map(str, kept)))
        notes.append(f"{len(kept)} matrices stay on the grid that they are stored on ({kinds}), bit for bit")
        finer = [m for m in kept if m.scales.dtype.bits > scale_dtype.bits]
        if finer:  # MatMulNBits and GatherBlockQuantized have one type for scales, offsets and activations
            notes.append(
                f"{len(finer)} of them have finer scales than {scale_dtype.torch_name}, in which the operators take "
                "them: those are rounded to it (--dtype float32 keeps them)"
            )
    if plan.widened:
        types = ", ".join(f"{n} {kind}" for kind, n in Counter(plan.widened.values()).items())
        become = "matrix becomes" if len(plan.widened) == 1 else "matrices become"
        names = listing(list(plan.widened), 2)
        notes.append(f"{len(plan.widened)} quantized {become} floats ({types}: {names}): MatMulNBits has no such grid")
    again = [name for name, lazy in plan.floats.items() if is_dequantized(lazy)]
    if again:
        notes.append(f"{len(again)} matrices were on another grid ({listing(again, 2)}) and are rounded a second time")
    return notes
