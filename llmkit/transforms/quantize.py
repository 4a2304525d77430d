"""Quantize the linear layers to int8 or int4, round to nearest, in the compressed-tensors layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.contents import require_model
from llmkit.errors import InputError, RequirementError, SpecError, listing, nearest
from llmkit.quantization.packing import n_words
from llmkit.quantization.quality import Meter
from llmkit.quantization.reading import model_dtype
from llmkit.quantization.rtn import Observe, quantize_packed
from llmkit.quantization.schemes import GROUP_SIZES, Scheme
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["GroupSize", "matches", "must_match", "quantize"]

GroupSize = int | Literal["auto", "channel"]

_FLOATS = (DType.F32, DType.F16, DType.BF16)
# Names of embeddings; `embed_out` is a head.
_TABLE = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b")


def quantize(
    ckpt: Checkpoint,
    *,
    bits: int,
    group_size: GroupSize = "auto",
    symmetric: bool = True,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    meter: Meter | None = None,
) -> Checkpoint:
    """Put the weights of the linear layers on an integer grid; embeddings, norms, biases and the head stay as they are.

    The result loads in transformers unchanged (with compressed-tensors installed), and in llmkit.

    Args:
        bits: 8 or 4.
        group_size: input columns that share a scale: 32, 64, 128, or "channel" for one scale a row. "auto" is a scale
            a row for 8 bits, and for 4 bits the largest of 128, 64, 32 that divides every row.
        symmetric: a grid centred on zero; otherwise each group has a zero point.
        keep: globs of module or tensor names to leave as they are.
        only: globs of the modules to quantize, instead of all linear layers; may name the head.
        meter: collects the relative error of every weight while it is written.

    Raises:
        SpecError: a group size that does not divide a row, a glob that matches nothing, nothing left to quantize.
        RequirementError: already quantized; an architecture that no plugin describes (unless `only` names layers);
            layers that are stored transposed.
    """
    require_model(ckpt, "quantize", floats=True)
    chosen, left, targets = _choose(ckpt, keep, only)
    scheme, reason = _scheme(ckpt, chosen, bits, group_size, symmetric)
    tensors: dict[str, Lazy] = {}
    for name, lazy in ckpt.tensors.items():
        if name in chosen:
            dtype = _scale_dtype(ckpt, name)
            tensors.update(_quantized(name, lazy, scheme, dtype, meter))
        else:
            tensors[name] = lazy
    config = dict(ckpt.config)
    config["quantization_config"] = scheme.quantization_config(targets=targets, ignore=left)
    notes = [f"{len(chosen)} linear layers to {scheme}{reason}, rounded to nearest"]
    if not symmetric:
        notes.append(
            "zero points load in transformers 5; transformers 4.57 needs compressed-tensors 0.14 to 0.17 for them"
        )
    if left:
        notes.append(f"linear layers kept as they are: {listing(left)}")
    step = {
        "transform": "quantize", "method": "rtn", **scheme.attrs(), "keep": list(keep), "only": list(only)
    }  # fmt: skip
    return ckpt.derive(tensors=tensors, config=config, step=step, notes=notes)


def _choose(ckpt: Checkpoint, keep: Sequence[str], only: Sequence[str]) -> tuple[dict[str, None], list[str], list[str]]:
    """Names of the weights to quantize (ordered), modules to ignore, targets of the config group."""
    architecture = registry.find(ckpt.config)
    for glob in (*keep, *only):
        must_match(ckpt, glob)
    if architecture is None:
        return _choose_blindly(ckpt, keep, only)
    model = architecture.bind(ckpt.config)
    slots = {name: slot for name, slot in model.tensors().items() if slot.kind in ("linear", "head")}
    chosen: dict[str, None] = {}
    for name, slot in slots.items():
        is_there = name in ckpt.tensors and len(slot.shape) == 2
        is_tied_head = slot.kind == "head" and model.is_tied
        is_wanted = matches(name, only) if only else slot.kind == "linear"
        if is_there and is_wanted and not is_tied_head and not matches(name, keep):
            chosen[name] = None
    if not chosen:
        raise SpecError(
            f"{ckpt.label}: nothing is left to quantize (only: {listing(only) or 'all linear layers'}; "
            f"keep: {listing(keep) or 'nothing'}); embeddings, norms and a head tied to the embedding never are",
            hint=f"name linear layers, such as {next(iter(slots)).removesuffix('.weight')}",
        )
    _refuse_transposed(ckpt, [name for name in chosen if slots[name].is_transposed])
    left = [n.removesuffix(".weight") for n, s in slots.items() if n not in chosen and n.endswith(".weight")]
    left += [architecture.names.in_memory[module] for module in left if module in architecture.names.in_memory]
    return chosen, left, ["Linear"]


def _refuse_transposed(ckpt: Checkpoint, names: Sequence[str]) -> None:
    """Their rows are inputs: scales would be those of the wrong axis, and no reader expects them there."""
    if names:
        raise RequirementError(
            f"{ckpt.label}: {listing(names, 1)} are stored as [in, out] (the Conv1D layers of transformers); "
            "compressed-tensors describes [out, in] only, and transformers would put random weights in their place",
            hint="a float dtype of half the size: llmkit convert MODEL --to hf --dtype bfloat16 -o OUT",
        )


def _choose_blindly(
    ckpt: Checkpoint, keep: Sequence[str], only: Sequence[str]
) -> tuple[dict[str, None], list[str], list[str]]:
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
    _refuse_transposed(ckpt, _transposed(ckpt, chosen))
    tables = [name for name in chosen if _TABLE.search(name) and _bias_length(ckpt, name) is None]
    if tables:
        raise SpecError(
            f"{ckpt.label}: {listing(tables, 1)} are embeddings by their names, which are never quantized",
            hint=f"leave them out: --keep {' --keep '.join(_globs(tables))}",
        )
    return chosen, [], [name.removesuffix(".weight") for name in chosen]


def _transposed(ckpt: Checkpoint, names: Iterable[str]) -> list[str]:
    """Which matrices are stored [in, out]: those whose bias is as long as a row, not as a column.

    A square matrix tells nothing; it is taken for one where the others of the checkpoint are.
    """
    found: dict[str, bool | None] = {}
    for name, lazy in ckpt.tensors.items():
        if name.endswith(".weight") and len(lazy.shape) == 2 and (n := _bias_length(ckpt, name)) is not None:
            n_rows, n_columns = lazy.shape
            found[name] = None if n_rows == n_columns else n == n_columns
    is_usual = True in found.values() and False not in found.values()
    return [n for n in names if found.get(n, False) or (found.get(n, False) is None and is_usual)]


def _bias_length(ckpt: Checkpoint, name: str) -> int | None:
    bias = ckpt.tensors.get(f"{name.removesuffix('weight')}bias")
    return bias.spec.numel if bias is not None else None


def _globs(names: Iterable[str]) -> list[str]:
    """Globs of the modules, the numbers of layers left open."""
    modules = (name.removesuffix(".weight") for name in names)
    return list(dict.fromkeys("'" + re.sub(r"\.\d+(?=\.)", ".*", module) + "'" for module in modules))


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs names the tensor or its module."""
    module = name.rpartition(".")[0]
    return any(fnmatchcase(name, glob) or fnmatchcase(module, glob) for glob in globs)


def must_match(ckpt: Checkpoint, glob: str) -> None:
    """Refuse a glob that names nothing.

    Raises:
        SpecError: it matches no module and no tensor.
    """
    if any(matches(name, [glob]) for name in ckpt.tensors):
        return
    known = dict.fromkeys(n for name in ckpt.tensors for n in (name.rpartition(".")[0], name))
    guess = nearest(glob, known)
    listed = f"`llmkit inspect {ckpt.origin or ckpt.label} --tensors` lists the names; * stands for any characters"
    raise SpecError(
        f"{ckpt.label}: {glob!r} matches no module and no tensor", hint=f"did you mean {guess}?" if guess else listed
    )


def _scheme(
    ckpt: Checkpoint, chosen: Mapping[str, None], bits: int, group_size: GroupSize, symmetric: bool
) -> tuple[Scheme, str]:
    """The scheme, and in words why an automatic group size was taken."""
    rows = {name: ckpt.tensors[name].shape[1] for name in chosen}
    fitting = [g for g in GROUP_SIZES if all(n % g == 0 for n in rows.values())]
    if group_size == "channel":
        return Scheme(bits, None, symmetric), ""
    if group_size == "auto":
        probe = Scheme(bits, None, symmetric)
        if bits == 8:
            return probe, ""
        if fitting:
            larger = [g for g in GROUP_SIZES if g > fitting[-1]]
            odd = next((f"{n} has rows of {k}" for g in larger for n, k in rows.items() if k % g), "")
            return Scheme(bits, fitting[-1], symmetric), f" ({larger[0]} does not divide: {odd})" if odd else ""
        group_size = GROUP_SIZES[0]
    elif not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise SpecError(
            f"group size {group_size!r} is not supported; expected {sizes} or channel", hint="--group-size 64"
        )
    scheme = Scheme(bits, group_size, symmetric)
    odd_rows = {name: n for name, n in rows.items() if not scheme.divides(n)}
    if odd_rows:
        own = [str(g) for g in GROUP_SIZES if all(n % g == 0 for n in odd_rows.values())]
        lengths = " or ".join(map(str, sorted(set(odd_rows.values()))[:3]))
        raise SpecError(
            f"{len(odd_rows)} of {len(rows)} layers have rows of {lengths} weights, which do not fall into groups of "
            f"{group_size}: {listing(odd_rows, 2)}; sizes that divide them: {', '.join([*own, 'channel'])}",
            hint=f"--group-size {fitting[-1] if fitting else 'channel'} fits every layer; or leave these in floats: "
            f"--keep {' --keep '.join(_globs(odd_rows))}",
        )
    return scheme, ""


def _scale_dtype(ckpt: Checkpoint, name: str) -> DType:
    """The model's dtype. transformers casts scales to it: a grid of finer scales would not be the one that runs."""
    stored = ckpt.tensors[name].dtype
    if stored not in _FLOATS:
        raise SpecError(
            f"{name} is {stored.name}; expected float32, float16 or bfloat16 weights",
            hint="llmkit convert MODEL --to hf --dtype bfloat16 -o OUT, then quantize that",
        )
    dtype = model_dtype(ckpt.config)
    return dtype if dtype in _FLOATS else stored


def _quantized(name: str, weight: Lazy, scheme: Scheme, scale_dtype: DType, meter: Meter | None) -> dict[str, Lazy]:
    """The tensors that replace one weight: siblings of one node."""
    n_out, n_in = weight.shape
    stem = name.removesuffix("weight")
    n_groups = scheme.n_groups(n_in)
    outputs = {
        f"{stem}weight_packed": (TensorSpec(DType.I32, (n_out, n_words(n_in, scheme.bits))), 1),
        f"{stem}weight_scale": (TensorSpec(scale_dtype, (n_out, n_groups)), 1),
        f"{stem}weight_shape": (TensorSpec(DType.I64, (2,)), 0),
    }
    if not scheme.is_symmetric:
        zeros = TensorSpec(DType.I32, (n_words(n_out, scheme.bits), n_groups))
        outputs[f"{stem}weight_zero_point"] = (zeros, scheme.per_word)
    observe: Observe | None = meter.observer(name, n_out) if meter is not None else None

    def fn(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        try:
            packed, scale, *zero = quantize_packed(rows, scheme, scale_dtype.torch, observe)
        except InputError as error:
            raise InputError(f"{name}: {error.message}", hint=error.hint) from error
        return packed, scale, torch.tensor([n_out, n_in]), *zero

    node = Apply(
        "quantize",
        [weight],
        [spec for spec, _ in outputs.values()],
        fn,
        scheme.attrs(),
        row_step=1 if scheme.is_symmetric else scheme.per_word,
        output_rows=[per for _, per in outputs.values()],
        scratch=1.0,
    )
    return dict(zip(outputs, node.outputs(), strict=True))
