"""Types of blocks for single matrices of a GGUF file: by a recipe, or as candidates to choose among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from llmkit.architecture.model import Model
from llmkit.architecture.storage import weights_of
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.embeddings import with_own_head
from llmkit.checkpoint.statistics import gguf_spelling
from llmkit.errors import InputError, SpecError, suggestion
from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.layouts.gguf_presets import PRESETS, fitting_type
from llmkit.quantization.codecs.gguf import CODEC, quantized
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.transforms.candidates import Candidate, Candidates
from llmkit.transforms.layers import matches
from llmkit.transforms.recipe import FLOAT, Recipe, Scheme

_OF_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
_FLOAT = "F16"
_TYPES = tuple(dict.fromkeys([mix.type for mix in PRESETS.values()]))


def as_filed(ckpt: Checkpoint) -> Checkpoint:
    """The checkpoint with the matrices that its GGUF file has: where llama.cpp wants it, a tied head of its own."""
    family = ckpt.architecture.gguf if ckpt.architecture is not None else None
    return with_own_head(ckpt) if family is not None and family.has_own_head else ckpt


def source_names(ckpt: Checkpoint, model: Model) -> dict[str, list[str]]:
    """What the checkpoint calls the tensors that make one of a GGUF file, by its name there."""
    of_part = {part.id: slot.name for slot in model.slots.values() for part in slot.parts}
    spelled = gguf_spelling(ckpt, model).slots.values()
    return {slot.name: list(dict.fromkeys(of_part[p.id] for p in slot.parts if p.id in of_part)) for slot in spelled}


def types_by_recipe(
    recipe: Recipe, shapes: Mapping[str, Sequence[int]], names: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """The types that a recipe gives the matrices that it names, by their names in the file or in the checkpoint.

    Args:
        shapes: of the matrices that may have another type, by their names in the file.
        names: as of `source_names`.

    Raises:
        InputError: no type of blocks, bits that none has, or a group size.
        SpecError: a glob that names no matrix.
    """
    found: dict[str, str] = {}
    for glob, scheme in recipe.items():
        kind = _type(glob, scheme)
        reached = [name for name in shapes if any(matches(own, [glob]) for own in (name, *names.get(name, ())))]
        if not reached:
            known = [name.removesuffix(".weight") for name in shapes]
            raise SpecError(
                f"recipe: {glob!r} names no matrix of the file", hint=suggestion(glob, known, "blk.*.attn_v")
            )
        for name in reached:
            found.setdefault(name, kind)
    return found


def _type(glob: str, scheme: Scheme) -> str:
    if scheme.group_size is not None or scheme.symmetric is not None:
        raise InputError(f"recipe: {glob}: blocks of GGUF have group sizes of their own", hint="{bits: 6}, or q6_k")
    kind = scheme.type or (_FLOAT if scheme.bits is None else _OF_BITS.get(scheme.bits, ""))
    if kind not in _TYPES:
        what = scheme.type.lower() or f"{scheme.bits} bits"
        raise InputError(
            f"recipe: {glob}: {what} is no type of blocks that is written; expected bits "
            f"({', '.join(map(str, _OF_BITS))}) or {', '.join(t.lower() for t in _TYPES)}",
            hint="q6_k",
        )
    return kind


def block_candidates(ckpt: Checkpoint, written: Checkpoint, recipe: Recipe) -> Candidates:
    """K-quants of 2 to 6 bits, 8 bits, and float16 for each matrix; what the recipe names has what it says.

    Args:
        ckpt: float tensors.
        written: the same as a GGUF file in float16, but for what the recipe names.
    """
    ckpt = as_filed(ckpt)
    model = ckpt.require_model()
    weights = weights_of(ckpt.tensors, model)
    slots = {slot.name: slot for slot in gguf_spelling(ckpt, model).slots.values()}
    found: dict[str, list[Candidate]] = {}
    by_id: dict[str, dict[str, Lazy]] = {}
    names = source_names(ckpt, model)
    for name, lazy in written.tensors.items():
        is_pinned = any(matches(own, list(recipe)) for own in (name, *names.get(name, ())))
        if lazy.dtype is not DType.F16 or name not in slots or is_pinned:
            continue
        slot, n = slots[name], lazy.shape[-1]
        if len(lazy.shape) != 2 + bool(slot.stack):
            continue
        n_rows = lazy.spec.numel // n
        kinds = dict.fromkeys(fitting_type(kind, n) for kind in _OF_BITS.values())
        found[name] = [
            Candidate(Scheme(type=kind), n_rows * TYPE_BY_NAME[kind].row_nbytes(n), partial(_restored, kind))
            for kind in kinds
            if kind != _FLOAT
        ]
        found[name].append(Candidate(FLOAT, lazy.spec.nbytes, None))
        by_id[name] = {part.id: weights[part.id] for part in slot.parts if part.id in weights}
        if model.is_tied and "embed.weight" in by_id[name]:
            by_id[name]["head.weight"] = by_id[name]["embed.weight"]
    total = sum(lazy.spec.nbytes for lazy in written.tensors.values())
    (file,) = written.container.lay_out(written.specs, 2**62).files
    fixed = total - sum(written.tensors[name].spec.nbytes for name in found)
    return Candidates(found, by_id, fixed, file.nbytes - total, shares_products=False)


def _restored(kind: str, weight: Lazy, squares: Lazy | None) -> Lazy:
    raw, (n_out, n_in) = quantized(weight, kind, "", squares), weight.shape
    return CODEC.read({"": raw}, {"type": kind}, (n_out, n_in)).dequantized(DType.F32)
