"""The tensors of a model as GGUF files have them, and back: names, fusions, order of rows, shifted norms, forms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import replace

from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.kinds import Rope
from llmkit.architecture.model import Model
from llmkit.architecture.storage import rotary_pairs, tensors_of, weights_of
from llmkit.errors import SpecError, listing
from llmkit.layouts.gguf_forms import from_gguf_values, leaf_of, to_gguf_values
from llmkit.layouts.gguf_shapes import from_gguf_shapes, to_gguf_shapes
from llmkit.layouts.layout import rotary_order
from llmkit.lazy_imports import torch
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.rearrange import reshape
from llmkit.tensors.spec import DType


def from_gguf(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """Tensors as the family's own checkpoints name and order them, from those of a GGUF file.

    Raises:
        SpecError: they do not fit the model.
    """
    stored = model.spelled(family.names)
    own = {slot.name for slot in stored.slots.values()}
    tensors = from_gguf_shapes(_unstacked(_scaled(tensors, own), family), stored, family)
    report = stored.check({name: lazy.spec for name, lazy in tensors.items()})
    if report.problems:
        raise SpecError(f"its tensors do not fit its metadata: {listing(report.problems, 3)}")
    weights = weights_of(tensors, stored)
    rotary = _rotary(model, family)
    original = rotary_order(rotary)
    if original is not None and original != family.pairs:
        weights = rotary_pairs(weights, rotary, to=original)
    weights = from_gguf_values(weights, stored, family.forms)
    return tensors_of(_norms_shifted(weights, -family.norm_offset, family), model)


def to_gguf(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """Tensors by their names in GGUF files, from those of the family's own checkpoints; a tied head is left out.

    Raises:
        SpecError: they do not fit the model.
    """
    weights = to_gguf_values(weights_of(tensors, model), model, family.forms)
    if model.is_tied:
        weights.pop("head.weight", None)
    rotary = _rotary(model, family)
    if rotary_order(rotary) not in (None, family.pairs):
        weights = rotary_pairs(weights, rotary, to=family.pairs)
    spelled = model.spelled(family.names)
    stored = tensors_of(_norms_shifted(weights, family.norm_offset, family), spelled)
    filed = _stacked(to_gguf_shapes(stored, spelled, family), family)
    repeats = family.repeats(model) if callable(family.repeats) else family.repeats
    return filed | {name: filed[of] for name, of in repeats.items() if of in filed}


def lists_to_metadata(
    tensors: Mapping[str, Lazy], family: GgufFamily
) -> tuple[dict[str, Lazy], dict[str, list[float]]]:
    """The tensors that a file has, from those of `to_gguf`, and the metadata that others are; these are loaded."""
    kept: dict[str, Lazy] = {}
    lists: dict[str, list[float]] = {}
    for name, lazy in tensors.items():
        key = family.in_metadata.get(name.split(".", 2)[-1]) if name.startswith("blk.") else None
        if key is None:
            kept[name] = lazy
        else:
            lists.setdefault(key, []).append(float(lazy.load().float().item()))
    return kept, lists


def lists_from_metadata(metadata: Metadata, model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """The tensors of `model`, as files name it, whose values are lists in metadata: float32."""
    found: dict[str, Lazy] = {}
    for slot in model.slots.values():
        key = family.in_metadata.get(slot.name.split(".", 2)[-1]) if slot.layer is not None else None
        values = metadata.get(key) if key is not None else None
        if isinstance(values, list) and slot.layer is not None and slot.layer < len(values):
            found[slot.name] = constant_of([float(values[slot.layer])], DType.F32, slot.shape)
    return found


def _rotary(model: Model, family: GgufFamily) -> Model:
    """The model, with rotary positions where files have its rows in that order all the same."""
    if not family.has_pairs_without_rope:
        return model
    return replace(model, blocks=tuple(replace(block, position=Rope()) for block in model.blocks))  # type: ignore[call-arg]


def _norms_shifted(weights: Mapping[str, Lazy], offset: float, family: GgufFamily) -> dict[str, Lazy]:
    """The weights of the family's shifted norms plus `offset`, in float32."""
    if not offset:
        return dict(weights)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.float() + offset

    def shifted(lazy: Lazy) -> Lazy:
        return Apply("add", [lazy], lazy.spec.with_dtype(DType.F32), fn, {"value": offset}).output()

    is_norm = {w for w in weights if "norm" in w and w.endswith(".weight") and leaf_of(w) not in family.unshifted}
    return {name: shifted(lazy) if name in is_norm else lazy for name, lazy in weights.items()}


def _scaled(tensors: Mapping[str, Lazy], own: Set[str]) -> dict[str, Lazy]:
    """Weights multiplied by their `.scale`, of one element or one for each expert; without those of their inputs.

    llama.cpp has them beside weights of any type (llama-model.cpp), NVFP4 needs them. Tensors of `own` names stay.
    """
    found = dict(tensors)
    for name in [n for n in tensors if n not in own]:
        stem, _, leaf = name.rpartition(".")
        weight, scale = tensors.get(f"{stem}.weight"), tensors[name]
        if weight is None or not leaf.endswith("scale"):
            continue
        if leaf == "input_scale":
            del found[name]
        elif leaf == "scale" and (scale.spec.numel == 1 or scale.shape == weight.shape[:-2]):
            found[f"{stem}.weight"] = _times(weight, scale)
            del found[name]
    return found


def _times(weight: Lazy, scale: Lazy) -> Lazy:
    is_each = scale.spec.numel > 1
    shape = (-1, *(1 for _ in weight.shape[1:]))

    def fn(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return x.float() * by.float().view(shape)

    spec = weight.spec.with_dtype(DType.F32)
    return Apply("multiply", [weight, scale], spec, fn, input_rows=[1, int(is_each)]).output()


def _stacked(tensors: Mapping[str, Lazy], family: GgufFamily) -> dict[str, Lazy]:
    """`blk.0.attn_q_norm.3.weight` and so on stacked as `blk.0.attn_q_norm.weight`, where files have them so."""
    joined: dict[str, Lazy] = {}
    rows: dict[str, list[Lazy]] = {}
    for name, lazy in tensors.items():
        match = re.fullmatch(r"((?:blk\.\d+\.)?(\w+))\.\d+\.weight", name)
        if match is not None and match[2] in family.stacked:
            rows.setdefault(f"{match[1]}.weight", []).append(lazy)
        else:
            joined[name] = lazy
    for name, parts in rows.items():
        joined[name] = reshape(Concat(parts).output(), (len(parts), *parts[0].shape))
    return joined


def _unstacked(tensors: Mapping[str, Lazy], family: GgufFamily) -> dict[str, Lazy]:
    split: dict[str, Lazy] = {}
    for name, lazy in tensors.items():
        match = re.fullmatch(r"((?:blk\.\d+\.)?(\w+))\.weight", name)
        if match is None or match[2] not in family.stacked or len(lazy.shape) < 2:
            split[name] = lazy
            continue
        for j in range(lazy.shape[0]):
            split[f"{match[1]}.{j}.weight"] = reshape(TakeRows(lazy, j, j + 1).output(), lazy.shape[1:])
    return split
