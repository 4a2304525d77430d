"""The tensors of a model as GGUF files have them, and back: names, fusions, order of rotary rows, offset of norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.kinds import Rope
from llmkit.architecture.model import Model
from llmkit.architecture.storage import rotary_pairs, tensors_of, weights_of
from llmkit.errors import SpecError, listing
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType

if TYPE_CHECKING:
    import torch

__all__ = ["from_gguf", "to_gguf"]


def from_gguf(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """Tensors as the family's own checkpoints name and order them, from those of a GGUF file.

    Raises:
        SpecError: they do not fit the model.
    """
    stored = model.spelled(family.names)
    report = stored.check({name: lazy.spec for name, lazy in tensors.items()})
    if report.problems:
        raise SpecError(f"its tensors do not fit its metadata: {listing(report.problems, 3)}")
    weights = weights_of(tensors, stored)
    rotary = _rotary(model, family)
    original = _pairs(rotary)
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
    if _pairs(rotary) not in (None, family.pairs):
        weights = rotary_pairs(weights, rotary, to=family.pairs)
    return tensors_of(_norms_shifted(weights, family.norm_offset), model.spelled(family.names))


def _rotary(model: Model, family: GgufFamily) -> Model:
    """The model, with rotary positions where files have its rows in that order all the same."""
    if not family.has_pairs_without_rope:
        return model
    return replace(model, blocks=tuple(replace(block, position=Rope()) for block in model.blocks))  # type: ignore[call-arg]


def _pairs(model: Model) -> str | None:
    """How the model's own checkpoints order rotary rows; None where nothing is rotated."""
    positions = [getattr(block, "position", None) for block in model.blocks]
    return next((p.pairs for p in positions if isinstance(p, Rope)), None)


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
