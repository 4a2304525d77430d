"""The protocol of layout modules: a `Layout` presents files of another program in transformers' layout.

A layout is a spelling (a `Names` table), the order of rotary pairs in the rows of q and k, and a translation of its
description of the model to a config.json and back. Everything else follows: weights are taken out of one spelling
and put into the other, lazily, so that one step at a time is in memory. Layouts are registered as entry points of the
group `llmkit.layouts`: one of another distribution is opened, and written by `convert --to`, like those here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmkit.architecture import registry
from llmkit.architecture.difference import difference
from llmkit.architecture.model import Model
from llmkit.architecture.names import Names
from llmkit.architecture.positions import Rope
from llmkit.architecture.storage import rotary_pairs, tensors_of, weights_of
from llmkit.errors import InputError, LlmkitError, PluginError, RequirementError, SpecError
from llmkit.formats.container import Container
from llmkit.layouts.candidate import Candidate
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType

Pairs = Literal["half", "interleaved"]


@dataclass(frozen=True)
class OpenedLayout:
    """A foreign layout as transformers would have it.

    Attributes:
        layout: its name, as `--to` spells it where it can be written.
        tensors: name -> lazy tensor, named and ordered as transformers names and orders them.
        config: the contents of a config.json.
        files: other files of the checkpoint that do not lie beside the weights: name -> where, or bytes.
        own: names of small files that describe the layout, and do not go along to another.
        scored_pieces: a tokenizer.bin, of which a tokenizer.model is made where there is none.
        notes: what was read and decided.
        warnings: what the user should act on.
        details: what else the files say of themselves, for `inspect`: `types` (how tensors are stored: name ->
            {"tensors": count, "nbytes": bytes}), `metadata`.
        vocabulary: metadata of a tokenizer that the files hold instead of tokenizer files.
    """

    layout: str
    tensors: Mapping[str, Lazy]
    config: Mapping[str, Any]
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    scored_pieces: Path | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenLayout:
    """A checkpoint in a foreign layout, ready to be planned.

    Attributes:
        tensors: name (unique over all files) -> lazy tensor.
        container: how they lie in files.
        files: small files of the layout.
        notes: what was decided.
    """

    tensors: Mapping[str, Lazy]
    container: Container
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spelling:
    """How a layout names its tensors, and the order of rotary pairs in its q and k (None: the model's own)."""

    names: Names
    pairs: Pairs | None = None


@dataclass(frozen=True)
class Layout:
    """A layout of files.

    Attributes:
        name: as `inspect` shows it, and `--to` spells it where it can be written.
        find: what a path holds; None where the files are of another layout.
        write: a checkpoint of transformers' layout (tensors, config.json) in this one; None for a layout that is read
            only. `options` are its further keyword arguments.
        summary: which files these are, in a few words, for help.
        options: names of the options of `write`.
        spellings: how it names tensors; adapters and drafts of plugins know the names by them.
        has_own_format: it is recognised by file names and first bytes. Others look at `Candidate.tensors`, which fails
            for what is neither safetensors nor a torch file, so they are asked last.
        pieces: the file of scored pieces that its programs read instead of a tokenizer.model, where they do.
    """

    name: str
    find: Callable[[Candidate], OpenedLayout | None]
    write: Callable[..., WrittenLayout] | None = None
    summary: str = ""
    options: tuple[str, ...] = ()
    spellings: tuple[Spelling, ...] = ()
    has_own_format: bool = False
    pieces: str | None = None


def to_hf(where: str, tensors: Mapping[str, Lazy], config: Mapping[str, Any], spelling: Spelling) -> dict[str, Lazy]:
    """The tensors of a foreign layout as transformers names and orders them.

    Raises:
        InputError: they do not fit the layout's description of the model.
    """
    model = plain_model(where, config)
    try:
        weights = weights_of(tensors, model.spelled(spelling.names))
        if model.is_tied:
            weights.pop("head.weight", None)
        order = rotary_order(model)
        if order is not None and spelling.pairs is not None and order != spelling.pairs:
            weights = rotary_pairs(weights, model, to=order)
        return tensors_of(weights, model)
    except SpecError as error:
        raise InputError(
            f"{where}: {error.message}", hint=error.hint or "take config.json and weights from one release"
        ) from error


def weights_for(
    name: str, tensors: Mapping[str, Lazy], config: Mapping[str, Any], described: Mapping[str, Any], spelling: Spelling
) -> tuple[Model, dict[str, Lazy]]:
    """The model and its weights by id, for a layout that describes the model as `described` (a config.json).

    Raises:
        RequirementError: the layout cannot say what the model is; the first difference is named.
    """
    label = f"--to {name}"
    model = registry.require_model(config, label)
    model.unread.raise_if_refused(label)
    differs = difference(model, registry.require_model(described, label))
    if differs is None:
        try:
            _ = model.spelled(spelling.names).slots  # every weight has a name
        except PluginError as error:
            differs = error.message
    if differs is not None:
        raise RequirementError(
            f"--to {name} cannot hold this {model.family} model: {differs}", hint="--to hf or --to bin holds any"
        )
    weights = weights_of(tensors, model)
    if spelling.pairs is not None and rotary_order(model) not in (None, spelling.pairs):
        weights = rotary_pairs(weights, model, to=spelling.pairs)
    return model, weights


def rotary_order(model: Model) -> Pairs | None:
    """Which dims of a head make a rotary pair; None for a model without rotary positions."""
    positions = (getattr(block, "position", None) for block in model.blocks)
    return next((position.pairs for position in positions if isinstance(position, Rope)), None)


def plain_model(where: str, config: Mapping[str, Any]) -> Model:
    """The model of a config that a layout's description was translated to."""
    try:
        return registry.require_model(config, where)
    except LlmkitError as error:
        if isinstance(error, SpecError):
            raise InputError(f"{where}: its description of the model does not hold: {error.message}") from error
        raise


def same_sizes(where: str, ours: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
    """Refuse a config.json that gives another model than the layout's own description.

    Raises:
        InputError: naming the first size or kind that differs.
    """
    differs = difference(plain_model(where, beside), plain_model(where, ours))
    if differs is not None:
        raise InputError(
            f"{where}: the config.json beside it tells of another model: {differs}",
            hint="remove the config.json, or put the one of this model there",
        )


def commonest_dtype(tensors: Mapping[str, Lazy]) -> DType:
    """The dtype of most elements."""
    counts: dict[DType, int] = {}
    for lazy in tensors.values():
        counts[lazy.dtype] = counts.get(lazy.dtype, 0) + lazy.spec.numel
    return max(counts, key=lambda d: counts[d])
