"""How the matrices of a model can be stored in a layout, and what is read of them then: what bits are chosen among."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmkit.architecture.storage import parts_of
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.embeddings import find_embeddings
from llmkit.checkpoint.quantized import model_dtype
from llmkit.quantization.codec import folder_codec
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import Task, method_named, quantized
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.transforms.layers import GroupSize, spelled_for
from llmkit.transforms.quantize import scale_dtype_of
from llmkit.transforms.recipe import FLOAT, Recipe, Scheme, first_matches
from llmkit.transforms.schemes import assign_grids

_BITS = (2, 3, 4, 8)
Restore = Callable[[Lazy, Lazy | None], Lazy]
"""A weight [out, in] as it is read after it was stored in some way, from it and the sums of x^2 of its inputs [in]."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to store a matrix.

    Attributes:
        nbytes: of all its tensors.
        restore: what is read of it later; None where nothing is lost.
    """

    scheme: Scheme
    nbytes: int
    restore: Restore | None


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a layout can make of a model.

    Attributes:
        matrices: that there is a choice for, by the names that the recipe shall have, with their ways to be stored.
        weights: of each of these, by canonical id (or by name, where no plugin describes the model), [out, in].
        fixed_nbytes: of all other tensors.
        header_nbytes: of the files, besides their tensors.
        shares_products: matrices of one product have one scheme.
    """

    matrices: Mapping[str, Sequence[Candidate]]
    weights: Mapping[str, Mapping[str, Lazy]]
    fixed_nbytes: int
    header_nbytes: int
    shares_products: bool


def codec_candidates(
    ckpt: Checkpoint,
    format: str,
    *,
    group_size: GroupSize = "auto",
    symmetric: bool | None = None,
    recipe: Recipe,
    keep: Sequence[str],
    only: Sequence[str],
) -> Candidates:
    """2, 3, 4 and 8 bits, where the layout has them, and floats; a matrix that the recipe names has what it says.

    Args:
        format, group_size, symmetric, keep, only: as of `llmkit.transforms.quantize.quantize`.

    Raises:
        LlmkitError: as of `llmkit.transforms.quantize.quantize`.
    """
    require_model(ckpt, "quantize", floats=True)
    codec, method = folder_codec(format), method_named("mse")
    ckpt = spelled_for(ckpt, codec)
    embeddings = find_embeddings(ckpt)
    head = embeddings.head if codec.holds_head and not only else None
    if head not in ckpt.tensors or embeddings.is_tied:
        head = None
    pinned = first_matches(ckpt.tensors, recipe)
    is_symmetric = True if symmetric is None and not codec.mixes_zeros else symmetric
    candidates: dict[str, list[Candidate]] = defaultdict(list)
    weights: dict[str, Lazy] = {}
    specs, wanted = dict(ckpt.specs), model_dtype(ckpt.config)
    for bits in sorted(set(_BITS) & set(codec.bits)):
        usual = Scheme(bits, group_size, is_symmetric)
        of_head = {head: usual} if head is not None and head not in pinned else {}
        assigned = assign_grids(ckpt, codec, usual, {**recipe, **of_head}, keep, only)
        for name, lazy in assigned.weights.items():
            if name in pinned and name in candidates:
                continue
            grid, dtype = assigned.grids[name], scale_dtype_of(ckpt, name, codec, wanted)
            matrix = quantized(Task(lazy, method, grid, dtype, name))
            if codec.refuses(matrix) is not None:
                continue
            parts = codec.write(matrix)
            scheme = Scheme(grid.bits, grid.group_size or "channel", grid.is_symmetric)
            candidates[name].append(
                Candidate(scheme, sum(p.spec.nbytes for p in parts.values()), _restore(grid, dtype))
            )
            weights[name] = lazy
            specs |= {name.removesuffix("weight") + end: part.spec for end, part in parts.items()}
    for name, options in candidates.items():
        if name not in pinned:
            options.append(Candidate(FLOAT, ckpt.tensors[name].spec.nbytes, None))
        specs.pop(name, None)
    slots = ckpt.model.tensors() if ckpt.model is not None else {}
    # What assign_grids gives is [out, in] already.
    by_id = {
        name: parts_of(lazy, slots[name].upright) if name in slots else {name: lazy} for name, lazy in weights.items()
    }
    files = ckpt.container.lay_out(specs, 2**62).files
    header = sum(file.nbytes for file in files) - sum(spec.nbytes for spec in specs.values())
    fixed = sum(lazy.spec.nbytes for name, lazy in ckpt.tensors.items() if name not in candidates)
    return Candidates(candidates, by_id, fixed, header, shares_products=True)


def _restore(grid: Grid, scale_dtype: DType) -> Restore:
    method = method_named("mse")

    def restore(weight: Lazy, squares: Lazy | None) -> Lazy:
        known = {"squares": squares} if squares is not None else None
        return quantized(Task(weight, method, grid, scale_dtype), known, 1).dequantized(DType.F32)

    return restore
