"""The tensors of a model as GGUF files have them, and back: names, fusions, order of rotary rows, offset of norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.kinds import Rope
from llmkit.architecture.model import Model
from llmkit.architecture.storage import rotary_pairs, tensors_of, weights_of
from llmkit.errors import SpecError, listing
from llmkit.layouts.layout import rotary_order
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.rearrange import reshaped
from llmkit.tensors.spec import DType


def from_gguf(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """Tensors as the family's own checkpoints name and order them, from those of a GGUF file.

    Raises:
        SpecError: they do not fit the model.
    """
    stored = model.spelled(family.names)
    tensors = _as_rows(_unstacked(tensors, family), stored)
    report = stored.check({name: lazy.spec for name, lazy in tensors.items()})
    if report.problems:
        raise SpecError(f"its tensors do not fit its metadata: {listing(report.problems, 3)}")
    weights = weights_of(tensors, stored)
    rotary = _rotary(model, family)
    original = rotary_order(rotary)
    if original is not None and original != family.pairs:
        weights = rotary_pairs(weights, rotary, to=original)
    return tensors_of(_norms_shifted(weights, -family.norm_offset), model)


def to_gguf(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """Tensors by their names in GGUF files, from those of the family's own checkpoints; a tied head is left out.

    Raises:
        SpecError: they do not fit the model.
    """
    weights = weights_of(tensors, model)
    if model.is_tied:
        weights.pop("head.weight", None)
    rotary = _rotary(model, family)
    if rotary_order(rotary) not in (None, family.pairs):
        weights = rotary_pairs(weights, rotary, to=family.pairs)
    spelled = model.spelled(family.names)
    return _stacked(_as_vectors(tensors_of(_norms_shifted(weights, family.norm_offset), spelled), spelled), family)


def _rows(model: Model) -> dict[str, tuple[int, ...]]:
    """The biases that the family keeps as a matrix of one row, by name; files have vectors."""
    return {s.name: s.shape for s in model.slots.values() if s.kind == "bias" and len(s.shape) == 2 and not s.stack}


def _as_vectors(tensors: Mapping[str, Lazy], model: Model) -> dict[str, Lazy]:
    rows = _rows(model)
    return {n: reshaped(lazy, lazy.shape[1:]) if n in rows else lazy for n, lazy in tensors.items()}


def _as_rows(tensors: Mapping[str, Lazy], model: Model) -> dict[str, Lazy]:
    rows = _rows(model)
    return {
        n: reshaped(lazy, rows[n]) if n in rows and lazy.shape == rows[n][1:] else lazy for n, lazy in tensors.items()
    }


def _rotary(model: Model, family: GgufFamily) -> Model:
    """The model, with rotary positions where files have its rows in that order all the same."""
    if not family.has_pairs_without_rope:
        return model
    return replace(model, blocks=tuple(replace(block, position=Rope()) for block in model.blocks))  # type: ignore[call-arg]


def _norms_shifted(weights: Mapping[str, Lazy], offset: float) -> dict[str, Lazy]:
    """The weights of all norms plus `offset`, in float32."""
    if not offset:
        return dict(weights)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.float() + offset

    def shifted(lazy: Lazy) -> Lazy:
        return Apply("add", [lazy], lazy.spec.with_dtype(DType.F32), fn, {"value": offset}).output()

    is_norm = {w for w in weights if "norm" in w and w.endswith(".weight")}
    return {name: shifted(lazy) if name in is_norm else lazy for name, lazy in weights.items()}


def _stacked(tensors: Mapping[str, Lazy], family: GgufFamily) -> dict[str, Lazy]:
    """Vectors `blk.0.attn_q_norm.3.weight` as rows of `blk.0.attn_q_norm.weight`, where files have them so."""
    joined: dict[str, Lazy] = {}
    rows: dict[str, list[Lazy]] = {}
    for name, lazy in tensors.items():
        match = re.fullmatch(r"(blk\.\d+\.(\w+))\.\d+\.weight", name)
        if match is not None and match[2] in family.stacked:
            rows.setdefault(f"{match[1]}.weight", []).append(lazy)
        else:
            joined[name] = lazy
    for name, parts in rows.items():
        joined[name] = reshaped(Concat(parts).output(), (len(parts), *parts[0].shape))
    return joined


def _unstacked(tensors: Mapping[str, Lazy], family: GgufFamily) -> dict[str, Lazy]:
    split: dict[str, Lazy] = {}
    for name, lazy in tensors.items():
        match = re.fullmatch(r"(blk\.\d+\.(\w+))\.weight", name)
        if match is None or match[2] not in family.stacked or len(lazy.shape) != 2:
            split[name] = lazy
            continue
        for j in range(lazy.shape[0]):
            split[f"{match[1]}.{j}.weight"] = reshaped(TakeRows(lazy, j, j + 1).output(), lazy.shape[1:])
    return split
