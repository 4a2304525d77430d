"""Which matrices are quantized, and in which groups: one rule for every layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache
from typing import Literal

from llmkit.architecture import registry
from llmkit.architecture.model import Model
from llmkit.architecture.slots import is_of_expert
from llmkit.architecture.storage import respelled
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.order import sort_tensors
from llmkit.checkpoint.text_part import text_part
from llmkit.errors import InputError, RequirementError, SpecError, listing, suggestion
from llmkit.quantization.codec import Codec, alternatives
from llmkit.quantization.matrix import Grid
from llmkit.quantization.points import Points

GroupSize = int | Literal["auto", "channel"]

# Names of embeddings; `embed_out` is a head.
_TABLE = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b")


@dataclass(frozen=True)
class Layers:
    """The layers of a model that are quantized.

    Attributes:
        names: of the weights, in the model's order.
        ignored: modules that stay in floats and that a loader may make linear layers of, by all names that they have.
        are_all: a plugin describes the model, which says by which names loaders know its layers.
        transposed: which of them the float model stores as [in, out].
        experts: which of them belong to an expert; told by name where no plugin describes the model.
    """

    names: Sequence[str]
    ignored: Sequence[str]
    are_all: bool
    transposed: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()


def exclusion_reasons(
    ckpt: Checkpoint, model: Model, keep: Sequence[str], only: Sequence[str], *, has_tables: bool = False
) -> dict[str, str | None]:
    """Every matrix of a model that can have a grid of its own, and why it stays in floats; None where it need not.

    Args:
        keep: globs of tensors or modules that stay.
        only: globs of those that do not; empty for all.
        has_tables: rows of an embedding can be looked up in the layout.

    Raises:
        SpecError: a glob that matches nothing.
    """
    for glob in (*keep, *only):
        must_match(ckpt, glob)
    reason_of: dict[str, str | None] = {}
    for slot in model.slots.values():
        is_tied_head = slot.kind == "head" and model.is_tied
        if slot.name not in ckpt.tensors or len(slot.shape) != 2 or slot.kind == "bias" or is_tied_head:
            continue
        reason = None
        if keep and matches(slot.name, keep):
            reason = "--keep"
        elif only and not matches(slot.name, only):
            reason = "--only"
        elif slot.kind not in ("linear", "head") and not (has_tables and slot.id == "embed.weight"):
            reason = "looked up, a router of experts, or multiplied element by element"
        reason_of[slot.name] = reason
    return reason_of


def nothing_to_quantize(ckpt: Checkpoint, model: Model, keep: Sequence[str], only: Sequence[str]) -> SpecError:
    """The error of globs that leave nothing to quantize."""
    example = next((slot.name for slot in model.slots.values() if slot.kind == "linear"), "lm_head.weight")
    return SpecError(
        f"{ckpt.label}: nothing is left to quantize (only: {listing(only) or 'all linear layers'}; keep: "
        f"{listing(keep) or 'nothing'}); norms never are, and a head that is tied to the embedding is part of it",
        hint=f"name linear layers, such as {example.removesuffix('.weight')}",
    )


def choose_layers(
    ckpt: Checkpoint, keep: Sequence[str], only: Sequence[str], codec: Codec, *, heads: Collection[str] = ()
) -> Layers:
    """The linear layers without those that `keep` names, or the ones that `only` names, which may be the head.

    Args:
        heads: weights of heads that are quantized, too, where `only` names nothing.

    Raises:
        SpecError: a glob that matches nothing, nothing left to quantize, or tensors that do not fit config.json.
        RequirementError: no plugin tells which layers are linear and `only` names none, or they are stored transposed
            and the layout does not take them.
    """
    model = ckpt.model
    if model is None:
        for glob in (*keep, *only):
            must_match(ckpt, glob)
        return _choose_without_plugin(ckpt, keep, only, codec)
    slots = model.tensors()
    reasons = exclusion_reasons(ckpt, model, keep, only)
    usual = {name for name, slot in slots.items() if slot.kind == "linear"} | set(heads)
    if not codec.holds_outer:
        usual = {name for name in usual if slots[name].kind == "head" or slots[name].layer is not None}
    chosen = [name for name, why in reasons.items() if why is None and (only or name in usual)]
    if not chosen:
        model.check(ckpt.specs).raise_if_bad(ckpt.label)
        raise nothing_to_quantize(ckpt, model, keep, only)
    return layers_of(ckpt, chosen, codec)


def layers_of(ckpt: Checkpoint, chosen: Sequence[str], codec: Codec) -> Layers:
    """The layers of which `chosen` are the weights that are quantized.

    Raises:
        RequirementError: some are stored transposed, and the layout does not take them.
    """
    model, ignored = ckpt.model, _left_linear(ckpt, chosen)
    if model is None:
        return Layers(chosen, ignored, False, experts=frozenset(filter(is_of_expert, chosen)))
    slots = model.tensors()
    transposed = [name for name in chosen if slots[name].is_transposed]
    _refuse_transposed(ckpt, transposed, codec)
    experts = frozenset(name for name in chosen if slots[name].is_of_expert)
    return Layers(chosen, ignored, True, frozenset(transposed), experts)


def _left_linear(ckpt: Checkpoint, chosen: Sequence[str]) -> list[str]:
    """The modules that a loader may make linear layers of, without those of which `chosen` are the weights.

    Every matrix may be one but a table that is looked up: classes of transformers and vLLM have linear layers where
    others have parameters (routers, gates, the parts of other modalities). Some have no matrix here: a head that is
    tied, and what a family's class has and never uses.
    """
    model, specs = ckpt.model, ckpt.specs
    slots = model.tensors() if model is not None else {}
    left_out = {name for name, slot in slots.items() if slot.kind == "embedding"}.union(chosen)
    names = [name for name, slot in slots.items() if name in specs or slot.kind == "head"]
    names += [*(model.unread_weights() if model is not None else ()), *specs]
    modules = [
        name.removesuffix(".weight")
        for name in dict.fromkeys(names)
        if name.endswith(".weight") and name not in left_out and (name not in specs or len(specs[name].shape) == 2)
    ]
    return list(dict.fromkeys([*modules, *map(model.names.loaded, modules)] if model is not None else modules))


def _refuse_transposed(ckpt: Checkpoint, names: Sequence[str], codec: Codec) -> None:
    """Their rows are inputs: scales would be those of the wrong axis, and no reader expects them there."""
    if names and not codec.takes_conv1d:
        raise RequirementError(
            f"{ckpt.label}: {listing(names, 1)} are stored as [in, out] (the Conv1D layers of transformers); "
            f"{codec.name} describes [out, in] only, and transformers would put random weights in their place",
            hint="--format gptq or bitsandbytes (convert: --to), whose loaders make linear layers of them; or a float "
            "dtype of half the size: llmkit convert MODEL --to hf --dtype bfloat16 -o OUT",
        )


def stacks_in_floats(ckpt: Checkpoint, only: Sequence[str]) -> list[str]:
    """The stacks of matrices, which no layout of single ones holds; without a plugin those that `only` names."""
    slots = ckpt.model.tensors() if ckpt.model is not None else None
    stacks = [name for name, spec in ckpt.specs.items() if len(spec.shape) == 3]
    if slots is None:
        return [name for name in stacks if matches(name, only)]
    return [name for name in stacks if name in slots and slots[name].stack]


def spelled_for(ckpt: Checkpoint, codec: Codec) -> Checkpoint:
    """The float checkpoint with the names that its family has beside the quantized matrices of this layout."""
    inner = text_part(ckpt)
    model = inner.model
    if model is None or not codec.name.startswith(model.names.apart_in):
        return ckpt
    tensors = respelled(inner.tensors, model, model.names.without_stacks)
    if inner is not ckpt:  # other modalities stay, and the names begin as they did
        whole = {id(lazy): name for name, lazy in ckpt.tensors.items()}
        stacks = {whole[id(lazy)]: name for name, lazy in inner.tensors.items() if name not in tensors}
        if not stacks:
            return ckpt
        (start,) = {name.removesuffix(own.removeprefix("model.")) for name, own in stacks.items()}
        made = {start + n.removeprefix("model."): t for n, t in tensors.items() if n not in inner.tensors}
        tensors = {name: lazy for name, lazy in ckpt.tensors.items() if name not in stacks} | made
    return replace(ckpt, tensors=sort_tensors(tensors))


def _choose_without_plugin(ckpt: Checkpoint, keep: Sequence[str], only: Sequence[str], codec: Codec) -> Layers:
    """Without a plugin a matrix may as well be an embedding or a transposed layer: the user must name the layers."""
    if not only:
        claims = listing(registry.claims(ckpt.config)) or "its architecture"
        raise RequirementError(
            f"{ckpt.label}: no plugin describes {claims}, so its linear layers are not known",
            hint="name them: --only 'model.layers.*.mlp.*' (`llmkit inspect MODEL --tensors` shows their names)",
        )
    chosen = {
        name: None
        for name, lazy in ckpt.tensors.items()
        if name.endswith(".weight") and len(lazy.shape) == 2 and matches(name, only) and not matches(name, keep)
    }
    if not chosen:
        raise SpecError(f"{ckpt.label}: --only {listing(only)} matches no matrix whose name ends in .weight")
    transposed = _transposed(ckpt, chosen)
    _refuse_transposed(ckpt, transposed, codec)
    tables = [name for name in chosen if _TABLE.search(name) and _bias_length(ckpt, name) is None]
    if tables:
        raise SpecError(
            f"{ckpt.label}: {listing(tables, 1)} are embeddings by their names, which are never quantized",
            hint=f"leave them out: --keep {' --keep '.join(globs_of(tables))}",
        )
    return replace(layers_of(ckpt, list(chosen), codec), transposed=frozenset(transposed))


def _transposed(ckpt: Checkpoint, names: Iterable[str]) -> list[str]:
    """Which matrices are stored [in, out]: those whose bias is as long as a row, not as a column.

    A square matrix tells nothing; it is taken for one where the others of the checkpoint are.
    """
    is_transposed: dict[str, bool | None] = {}
    for name, lazy in ckpt.tensors.items():
        if name.endswith(".weight") and len(lazy.shape) == 2 and (n := _bias_length(ckpt, name)) is not None:
            n_rows, n_columns = lazy.shape
            is_transposed[name] = None if n_rows == n_columns else n == n_columns
    is_usual = True in is_transposed.values() and False not in is_transposed.values()
    return [n for n in names if is_transposed.get(n, False) or (is_transposed.get(n, False) is None and is_usual)]


def _bias_length(ckpt: Checkpoint, name: str) -> int | None:
    bias = ckpt.tensors.get(f"{name.removesuffix('weight')}bias")
    return bias.spec.numel if bias is not None else None


def globs_of(names: Iterable[str]) -> list[str]:
    """Globs of the modules, the numbers of layers left open."""
    modules = (name.removesuffix(".weight") for name in names)
    return list(dict.fromkeys("'" + re.sub(r"\.\d+(?=\.)", ".*", module) + "'" for module in modules))


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs names the tensor or its module."""
    return matcher(tuple(globs))(name) is not None


@lru_cache
def matcher(globs: tuple[str, ...]) -> Callable[[str], str | None]:
    """What gives the first of the globs that names a tensor or its module.

    Names are looked up, of which there may be thousands (experts); only what has wildcards is tried one by one.
    """
    is_name = [not set(glob) & set("*?[") for glob in globs]
    exact = {globs[i]: i for i in reversed(range(len(globs))) if is_name[i]}
    patterns = [(i, re.compile(translate(glob))) for i, glob in enumerate(globs) if not is_name[i]]

    def first_match(name: str) -> str | None:
        module = name.rpartition(".")[0]
        first = min(exact.get(name, len(globs)), exact.get(module, len(globs)))
        first = next((i for i, glob in patterns if i < first and (glob.match(name) or glob.match(module))), first)
        return globs[first] if first < len(globs) else None

    return first_match


def must_match(ckpt: Checkpoint, glob: str) -> None:
    """Refuse a glob that names nothing.

    Raises:
        SpecError: it matches no module and no tensor.
    """
    if glob in ckpt.tensors or any(matches(name, [glob]) for name in ckpt.tensors):
        return
    known = dict.fromkeys(n for name in ckpt.tensors for n in (name.rpartition(".")[0], name))
    listed = f"`llmkit inspect {ckpt.origin or ckpt.label} --tensors` lists the names; * stands for any characters"
    raise SpecError(f"{ckpt.label}: {glob!r} matches no module and no tensor", hint=suggestion(glob, known, listed))


# What `--group-size auto` tries, the best first. SmolLM2-135M in asymmetric int4, the rest in floats: perplexity 24.0
# in groups of 32, 24.7 of 64, 25.8 of 128 (18.4 in float32), and 64 take 11 % fewer bytes than 32.
_AUTO_GROUPS, _AUTO_GROUPS_OF_8 = (64, 32), (128, 64, 32)
SMALLEST_GROUP = _AUTO_GROUPS[-1]


def choose_grid(
    codec: Codec,
    bits: int | None,
    group_size: GroupSize,
    symmetric: bool | None,
    rows: Mapping[str, int],
    type: str = "",
) -> tuple[Grid, str]:
    """The grid of some matrices, and in words why an automatic group size was taken.

    Args:
        codec: what has to hold it.
        bits: of codes; None for those of `type`.
        group_size: "auto" is the largest of 64 and 32 that divides every row; for 8 bits 128, too, and one scale a row
            where none divides.
        symmetric: None: asymmetric, where the layout has zero points and its kernels expect them.
        rows: names of the matrices, and the weights in a row.
        type: what codes stand for: "int", or a name of `llmkit.quantization.points`; empty for integers, where the
            layout has them.

    Raises:
        InputError: bits, a group size or a type that the layout does not have.
        SpecError: groups that a row does not fall into.
    """
    points = points_of(codec, bits, type)
    bits = points.bits if points is not None else bits or 0
    sizes, size, reason = codec.sizes_for(points), group_size, ""
    if size == "auto":
        size, reason = _automatic(codec, bits, sizes, rows)
    elif size not in sizes:
        known = ", ".join(map(str, sizes))
        numbers = [n for n in sizes if isinstance(n, int)]
        wanted = size if isinstance(size, int) else 64
        near = min(numbers, key=lambda n: abs(n - wanted), default="channel")
        raise InputError(f"--group-size {size}: expected {known} or auto", hint=f"--group-size {near}")
    if symmetric is None:
        symmetric = codec.prefers_symmetric or not codec.holds_zeros or points is not None
    elif not symmetric and (points is not None or not codec.holds_zeros):
        what = f"{points.name} has" if points is not None else f"{codec.name} has"
        raise InputError(f"--asymmetric: {what} no zero points", hint="leave --asymmetric out")
    grid = Grid(bits, size if isinstance(size, int) else None, symmetric, points, codec.lowest_zero)
    odd = {name: n for name, n in rows.items() if not grid.divides(n)}
    if odd and not codec.fills_rows:
        raise _odd_rows(sizes, grid, rows, odd)
    return grid, reason


def points_of(codec: Codec, bits: int | None, type: str) -> Points | None:
    """What codes stand for in a layout; None for integers.

    Raises:
        InputError: it has no such type, or no such bits.
    """
    by_name = {points.name: points for points in codec.points}
    known_types = ["int", *by_name] if codec.bits else list(by_name)
    if type and type not in known_types:
        raise InputError(
            f"--type {type}: {codec.name} has {' and '.join(known_types)}", hint=f"--type {known_types[-1]}"
        )
    if type in by_name:
        points = by_name[type]
        if bits not in (points.bits, None):
            raise InputError(f"--bits {bits}: {type} has codes of {points.bits} bits", hint=f"--bits {points.bits}")
        return points
    known, bits = codec.bits if type else codec.all_bits, bits or 0
    if bits not in known:
        near = min(known, key=lambda n: abs(n - bits))
        raise InputError(f"--bits {bits}: expected {alternatives(known)} in {codec.name}", hint=f"--bits {near}")
    return None if bits in codec.bits else next(points for points in codec.points if points.bits == bits)


def _automatic(codec: Codec, bits: int, known: Sequence[GroupSize], rows: Mapping[str, int]) -> tuple[GroupSize, str]:
    sizes, larger = [size for size in (_AUTO_GROUPS_OF_8 if bits == 8 else _AUTO_GROUPS) if size in known], ""
    if not sizes:
        return known[-1], ""
    for size in sizes:
        name = next((name for name, n in rows.items() if n % size), None)
        if name is None:
            return size, larger
        larger = f" ({size} does not divide: {name} has rows of {rows[name]})"
        filled = f" (rows of {rows[name]} are filled up: {name})"
    if codec.fills_rows:
        return sizes[-1], filled
    # One scale a row is fine enough for 8 bits.
    return ("channel", larger) if bits == 8 and "channel" in known else (sizes[-1], "")


def _odd_rows(sizes: Sequence[GroupSize], grid: Grid, rows: Mapping[str, int], odd: Mapping[str, int]) -> SpecError:
    """Rows that do not fall into groups, with the sizes that fit."""

    def dividing(lengths: Iterable[int]) -> list[GroupSize]:
        return [size for size in sizes if not isinstance(size, int) or all(n % size == 0 for n in lengths)]

    fitting = [size for size in dividing(rows.values()) if size != "channel"] or dividing(rows.values())
    lengths = " or ".join(map(str, sorted(set(odd.values()))[:3]))
    divisors = ", ".join(map(str, dividing(odd.values()))) or "none"
    remedy = f"--group-size {fitting[-1]} fits every layer; or leave" if fitting else "leave"
    return SpecError(
        f"{len(odd)} of {len(rows)} layers have rows of {lengths} weights, which do not fall into groups of "
        f"{grid.group_size}: {listing(odd, 2)}; sizes that divide them: {divisors}",
        hint=f"{remedy} these in floats: --keep {' --keep '.join(globs_of(odd))}",
    )
