"""Weights that GGUF files have as other numbers or in another order than checkpoints: both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmkit.architecture.gguf import Form, GgufFamily
from llmkit.architecture.model import Model
from llmkit.architecture.storage import tensors_of, weights_of
from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat
from llmkit.tensors.rearrange import gather_rows, join_columns, take_columns
from llmkit.tensors.spec import DType


def leaf_of(id: str) -> str:
    """`attn.q.weight` of `layers.3.attn.q.weight`; what lies outside the layers as it is."""
    return re.sub(r"layers\.\d+\.", "", id, count=1)


def to_gguf_values(weights: Mapping[str, Lazy], model: Model, forms: Mapping[str, Form]) -> dict[str, Lazy]:
    """Weights as files have them, but for their shapes, from weights by id."""
    return {id: _formed(lazy, model, id, forms.get(leaf_of(id))) for id, lazy in weights.items()}


def from_gguf_values(weights: Mapping[str, Lazy], stored: Model, forms: Mapping[str, Form]) -> dict[str, Lazy]:
    """The way back; `stored` is the model in the names of files."""
    return {id: _unformed(lazy, stored, id, forms.get(leaf_of(id))) for id, lazy in weights.items()}


def fold_multipliers(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> tuple[dict[str, Lazy], Model]:
    """The tensors of a checkpoint with the family's factors in them, in float32, and the model without these.

    Raises:
        SpecError: the tensors do not fit the model.
    """
    if family.fold is None:
        return dict(tensors), model
    plain, factors = family.fold(model)
    weights = weights_of(tensors, model)
    if model.is_tied:
        weights.pop("head.weight", None)
        weights |= {} if plain.is_tied else {"head.weight": weights["embed.weight"]}
    scaled = {id: _scaled(lazy, model, factors.get(leaf_of(id), ())) for id, lazy in weights.items()}
    return tensors_of(scaled, plain), plain


def _scaled(lazy: Lazy, model: Model, factors: Sequence[tuple[str, float]]) -> Lazy:
    if all(factor == 1.0 for _, factor in factors):
        return lazy
    parts, start = [], 0
    for rows, factor in factors:
        stop = start + model.dims.evaluate(rows) if rows else lazy.shape[0]
        parts.append(_times(gather_rows([lazy], [(0, start, stop)]), factor))
        start = stop
    return parts[0] if len(parts) == 1 else Concat(parts).output()


def _times(lazy: Lazy, factor: float) -> Lazy:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.float() * factor

    return Apply("multiply", [lazy], lazy.spec.with_dtype(DType.F32), fn, {"by": factor}).output()


def _formed(lazy: Lazy, model: Model, id: str, form: Form | None) -> Lazy:
    if form is None:
        return lazy
    lazy = _halved(_ordered(lazy, model, form, inverse=False), model, id, form, inverse=False)
    return _decay(lazy, model.name_of(id)) if form.value == "-exp" else lazy


def _unformed(lazy: Lazy, stored: Model, id: str, form: Form | None) -> Lazy:
    if form is None:
        return lazy
    lazy = _log_decay(lazy, stored.name_of(id)) if form.value == "-exp" else lazy
    return _halved(_ordered(lazy, stored, form, inverse=True), stored, id, form, inverse=True)


def _ordered(lazy: Lazy, model: Model, form: Form, *, inverse: bool) -> Lazy:
    if form.rows is not None:
        order, size = _order(model, form.rows, lazy.shape[0], inverse=inverse)
        lazy = gather_rows([lazy], [(0, j * size, (j + 1) * size) for j in order])
    if form.columns is not None:
        order, size = _order(model, form.columns, lazy.shape[1], inverse=inverse)
        if order != sorted(order):
            lazy = join_columns([take_columns(lazy, j * size, (j + 1) * size) for j in order])
    return lazy


def _halved(lazy: Lazy, model: Model, id: str, form: Form, *, inverse: bool) -> Lazy:
    """Divided by 2 once for every `n` layers before that of `id`; exact except for subnormal numbers."""
    every = model.dims.evaluate(form.halved_after) if form.halved_after else 0
    halvings = int(id.split(".")[1]) // every if every else 0
    if not halvings:
        return lazy
    factor = 2.0 ** (halvings if inverse else -halvings)
    return Apply("multiply", [lazy], lazy.spec, lambda x: x * factor, {"by": factor}).output()


def _order(model: Model, blocks: tuple[str, str], n: int, *, inverse: bool) -> tuple[list[int], int]:
    """Which block stands at each place, and how many of the `n` rows are one."""
    groups, count = (model.dims.evaluate(formula) for formula in blocks)
    outer, inner = (count // groups, groups) if inverse else (groups, count // groups)
    return [i * inner + j for j in range(inner) for i in range(outer)], n // count


def _decay(lazy: Lazy, name: str) -> Lazy:
    """-exp(x) in float32, to half a unit in the last place.

    Evaluated, it raises InputError where that is zero or infinite, of which there is no way back.
    """

    def fn(x: torch.Tensor) -> torch.Tensor:
        a = -torch.exp(x.double()).float()
        if not (a.isfinite() & (a < 0)).all():
            bad = x[~(a.isfinite() & (a < 0))].flatten()[0].item()
            raise InputError(
                f"{name} has the value {bad:g}, of which -exp is no negative float32",
                hint="the weights are damaged: download or copy the checkpoint again",
            )
        return a

    return Apply("-exp", [lazy], lazy.spec.with_dtype(DType.F32), fn, scratch=4.0).output()


def _log_decay(lazy: Lazy, name: str) -> Lazy:
    """log(-x) in float32: of -exp(y), y to within 2**-24 and half a unit in its last place.

    Evaluated, it raises InputError where x is not negative and finite.
    """

    def fn(x: torch.Tensor) -> torch.Tensor:
        if not (x.isfinite() & (x < 0)).all():
            bad = x[~(x.isfinite() & (x < 0))].flatten()[0].item()
            raise InputError(
                f"{name} has the value {bad:g}: a decay of a state must be negative and finite",
                hint="the file is damaged or was written by another program: download or convert it again",
            )
        return torch.log(-x.double()).float()

    return Apply("log(-x)", [lazy], lazy.spec.with_dtype(DType.F32), fn, scratch=4.0).output()
