"""Which grid each matrix of a model gets: that of all, or the one that a recipe gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.embeddings import find_embeddings
from llmkit.errors import InputError, SpecError, listing
from llmkit.quantization.codec import Codec, alternatives
from llmkit.quantization.matrix import Grid
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.transforms.layers import (
    SMALLEST_GROUP,
    Layers,
    choose_grid,
    choose_layers,
    exclusion_reasons,
    layers_of,
    matches,
    must_match,
)
from llmkit.transforms.recipe import Recipe, Scheme, first_matches

FLOAT_BITS = 16
_T = TypeVar("_T")


@dataclass(frozen=True)
class GridAssignment:
    """The matrices that are quantized.

    Attributes:
        layers: their names, and what stays in floats.
        weights: floats [out, in], by name.
        grids: of each.
        words: what was chosen, for the plan.
    """

    layers: Layers
    weights: Mapping[str, Lazy]
    grids: Mapping[str, Grid]
    words: str


def head_and_embedding_recipe(
    ckpt: Checkpoint, *, head_bits: int | None, embedding_bits: int | None
) -> dict[str, Scheme]:
    """What `--head-bits` and `--embedding-bits` mean as a recipe; 16 leaves the matrix in floats.

    Raises:
        SpecError: the head is the embedding, or it cannot be told which tensors they are.
    """
    if head_bits is None and embedding_bits is None:
        return {}
    embeddings, recipe = find_embeddings(ckpt), {}
    for option, bits, name in (("head", head_bits, embeddings.head), ("embedding", embedding_bits, embeddings.embed)):
        if bits is None:
            continue
        if option == "head" and embeddings.is_tied:
            if bits == embedding_bits:
                continue
            raise SpecError(
                f"{ckpt.label}: --head-bits {bits}: its head is its embedding, one matrix ({embeddings.embed})",
                hint=f"--embedding-bits {bits} is for both, where the format can hold an embedding (--format gguf)",
            )
        if name is None:
            raise SpecError(f"{ckpt.label}: no tensor is known to be the {option}", hint=f"leave --{option}-bits out")
        recipe[name] = Scheme(None if bits == FLOAT_BITS else bits)
    return recipe


def assign_grids(
    ckpt: Checkpoint, codec: Codec, usual: Scheme, recipe: Recipe, keep: Sequence[str], only: Sequence[str]
) -> GridAssignment:
    """The matrices that a layout is to hold, and the grid of each.

    Args:
        usual: of linear layers that the recipe does not name; where it has no bits, they stay in floats.
        keep, only: as of `llmkit.transforms.layers.choose_layers`; they go before the recipe.

    Raises:
        InputError: bits or a group size that the layout does not have.
        SpecError: a glob that matches nothing, or no matrix that can be quantized, or a row that falls into no groups.
        RequirementError: as of `choose_layers`.
    """
    for glob, scheme in recipe.items():
        must_match(ckpt, glob)
        _refuse_type_and_bits(glob, scheme, codec)
    globs = first_matches(ckpt.tensors, recipe)
    float_names = [name for name, glob in globs.items() if recipe[glob].is_float]
    quantized = [name for name, glob in globs.items() if not recipe[glob].is_float]
    embeddings = find_embeddings(ckpt)
    heads = [name for name in quantized if name == embeddings.head]
    if usual.is_float:
        only = [name for name in quantized if not only or matches(name, only)]
        only = [name for name in only if len(ckpt.tensors[name].shape) == 2]
    layers = choose_layers(ckpt, [*keep, *float_names], only, codec, heads=heads)
    _refuse_out_of_reach(ckpt, codec, recipe, globs, layers, keep, only)
    chosen = set(layers.names)
    weights = {name: lazy for name, lazy in ckpt.tensors.items() if name in chosen}
    weights |= {name: transpose(weights[name]) for name in layers.transposed}
    schemes = {name: _completed(recipe[globs[name]], usual) if name in globs else usual for name in weights}
    odd = [] if codec.fills_rows else _without_groups(weights, schemes)
    if odd:
        layers = layers_of(ckpt, [name for name in layers.names if name not in odd], codec)
        weights = {name: lazy for name, lazy in weights.items() if name not in odd}
    if not codec.mixes_zeros and (layers.experts or len(distinct(schemes.values())) > 1):
        schemes = _centred(schemes)
    grids, words = _grids_of(weights, schemes, codec)
    text = ", ".join(f"{n} to {kind}" for kind, n in words.most_common())
    if odd:
        text += f" ({len(odd)} whose rows fall into no groups of {SMALLEST_GROUP} stay in floats: {listing(odd, 1)})"
    return GridAssignment(layers, weights, grids, text.replace(" to ", " linear layers to ", 1))


def _refuse_type_and_bits(glob: str, scheme: Scheme, codec: Codec) -> None:
    if scheme.type and scheme.type.lower() not in ("int", *(points.name for points in codec.points)):
        raise InputError(
            f"recipe: {glob} is to be {scheme.type}, a type of GGUF's blocks; {codec.name} has grids of "
            f"{alternatives(codec.all_bits)} bits",
            hint="write {bits: 4, group_size: 64} there, or take --format gguf",
        )
    if scheme.bits is not None and not scheme.type and scheme.bits not in codec.all_bits:
        raise InputError(
            f"{glob} is to have {scheme.bits} bits; expected {alternatives(codec.all_bits)} in {codec.name}",
            hint="give it such bits or leave it in floats; --format compressed-tensors has 2 to 8",
        )


def _centred(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes, symmetric where they do not say that they are not."""
    each = {id(s): s for s in schemes.values()}
    centred = {key: replace(s, symmetric=s.symmetric is not False) for key, s in each.items()}
    return {name: centred[id(s)] for name, s in schemes.items()}


def _grids_of(
    weights: Mapping[str, Lazy], schemes: Mapping[str, Scheme], codec: Codec
) -> tuple[dict[str, Grid], Counter[str]]:
    """The grid of each weight, and how many have which, in words."""
    grids: dict[str, Grid] = {}
    words: Counter[str] = Counter()
    for scheme in distinct(schemes.values()):
        rows = {n: t.shape[1] for n, t in weights.items() if (its := schemes[n]) is scheme or its == scheme}
        size = "auto" if scheme.group_size is None else scheme.group_size
        grid, reason = choose_grid(codec, scheme.bits, size, scheme.symmetric, rows, scheme.type.lower())
        grids |= dict.fromkeys(rows, grid)
        words[f"{grid}{reason}"] += len(rows)
    return grids, words


def distinct(values: Iterable[_T]) -> list[_T]:
    """Those that are not equal, in order. Thousands of layers have one and the same, which is compared once."""
    return list(dict.fromkeys({id(value): value for value in values}.values()))


def _without_groups(weights: Mapping[str, Lazy], schemes: Mapping[str, Scheme]) -> list[str]:
    """Weights for whose rows there is no automatic group size, where there is one for others.

    Of 8 bits they get one scale a row, which is fine enough.
    """
    automatic = {name for name, s in schemes.items() if s.group_size in (None, "auto") and (s.bits or 0) < 8}
    odd = [name for name in weights if name in automatic and weights[name].shape[1] % SMALLEST_GROUP]
    return odd if len(odd) < len(weights) else []


def _completed(scheme: Scheme, usual: Scheme) -> Scheme:
    """The scheme with its missing settings filled in from the usual grid; with the same bits and no more, that grid."""
    if scheme == Scheme(usual.bits):
        return usual
    size = usual.group_size if scheme.group_size is None else scheme.group_size
    return replace(scheme, group_size=size, symmetric=usual.symmetric if scheme.symmetric is None else scheme.symmetric)


def _refuse_out_of_reach(
    ckpt: Checkpoint,
    codec: Codec,
    recipe: Recipe,
    globs: Mapping[str, str],
    layers: Layers,
    keep: Sequence[str],
    only: Sequence[str],
) -> None:
    """Refuse a glob with bits that reaches no matrix which can have them.

    Raises:
        SpecError: naming the matrix, and the reason.
    """
    reached = {globs[name] for name in layers.names if name in globs}
    for glob, scheme in recipe.items():
        mine = [name for name, other in globs.items() if other == glob]
        if scheme.is_float or glob in reached or not mine:
            continue
        model = ckpt.model
        if mine[0] == find_embeddings(ckpt).embed:
            raise SpecError(
                f"{ckpt.label}: {mine[0]} is the embedding, which no loader of {codec.name} takes quantized",
                hint="--format gguf holds it; or leave it in floats",
            )
        why = exclusion_reasons(ckpt, model, keep, only).get(mine[0]) if model is not None else None
        raise SpecError(
            f"{ckpt.label}: {glob!r} is to have {scheme.bits} bits, and {mine[0]} cannot: {why or 'it is no matrix'}",
            hint="name linear layers, or the head",
        )
