"""Statistics of the inputs of a model's weights in a file: llmkit's own, or an importance matrix of llama.cpp.

llmkit's file is safetensors: tensors `WEIGHT.FIELD`, where WEIGHT is the canonical id of a weight
(`layers.3.attn.q.weight`, the same in every layout of a model) and FIELD one of `Statistics`; its metadata hold the
tokens that were seen, and which text. An importance matrix names tensors as GGUF files do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmkit.architecture.model import Model
from llmkit.architecture.registry import require
from llmkit.architecture.slots import Slot
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, RequirementError, SpecError, listing
from llmkit.formats import imatrix, safetensors
from llmkit.formats.json_text import parse_object
from llmkit.formats.unreadable import read_head
from llmkit.layouts.gguf_forms import leaf_of
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import TakeRows
from llmkit.tensors.rearrange import reshape
from llmkit.tensors.spec import DType, TensorSpec

KEY = "llmkit.statistics"
"""Metadata key of llmkit's own files: JSON with `tokens`, and what the model had read."""
_FIELDS = tuple(f.name for f in fields(Statistics) if f.name != "n_tokens")


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics by weight, read when they are needed.

    Attributes:
        label: the file, for messages.
        parts: by the canonical id of the weight, then by field of `Statistics`.
        n_tokens: what sums are divided by for a mean, by the id of the weight.
        about: what the model had read, as plain data.
    """

    label: str
    parts: Mapping[str, Mapping[str, Lazy]]
    n_tokens: Mapping[str, float]
    about: Mapping[str, Any] = field(default_factory=dict)

    def known(self, slot: Slot) -> Mapping[str, Lazy]:
        """Fields of `Statistics` of the inputs of a stored tensor, whose weights have the same ones; empty for none."""
        return next((self.parts[part.id] for part in slot.parts if part.id in self.parts), {})

    def tokens(self, slot: Slot) -> float:
        """What the sums are divided by for a mean; 0 where nothing is known."""
        return next((self.n_tokens[part.id] for part in slot.parts if part.id in self.n_tokens), 0)

    def gap(self, names: Sequence[str]) -> str:
        """That the file knows nothing of the inputs of some matrices, in words; empty for none."""
        if not names:
            return ""
        what = f"of {listing(names, 2)}" if len(names) < 3 else f"of {len(names)} matrices ({listing(names, 1)})"
        return f"tells nothing of the inputs {what}: all of them count alike"

    def attrs(self) -> dict[str, Any]:
        """Plain data, for the history."""
        return {"statistics": self.label, **self.about}

    def squares(self, slot: Slot) -> Lazy | None:
        """The sum of x^2 of each input channel of a stored tensor, float32 [in]; None where it is not stored."""
        parts = self.known(slot)
        if "squares" in parts:
            return parts["squares"]
        moments = parts.get("second_moments")
        if moments is None:
            return None
        spec = TensorSpec(DType.F32, moments.shape[:1])
        return Apply("diagonal", [moments], spec, lambda x: x.diagonal().float(), row_step=None).output()

    def of(self, slot: Slot) -> Statistics | None:
        """Of the inputs of a stored tensor; None where nothing is known."""
        parts = self.known(slot)
        return Statistics(self.tokens(slot), **{name: lazy.load() for name, lazy in parts.items()}) if parts else None


def open_statistics(path: Path, ckpt: Checkpoint) -> StoredStatistics:
    """The statistics in a file, for the weights of a model. Reads headers only.

    Raises:
        InputError: no such file, or it holds no statistics.
        RequirementError: no plugin describes the model, or llama.cpp does not know it.
        SpecError: they are of a model with other sizes.
    """
    model = ckpt.require_model()
    if not path.is_file():
        hint = f"llmkit quantize observe {ckpt.origin or ckpt.label} -o FILE writes one"
        raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}: no statistics", hint=hint)
    is_own = safetensors.looks_like(read_head(path))
    statistics = _own(path) if is_own else _from_imatrix(path, imatrix.read(path), ckpt, model)
    for slot in model.slots.values():
        for part in slot.parts:
            for name, lazy in statistics.parts.get(part.id, {}).items():
                expected = (part.shape[-1],) * len(lazy.shape)
                if lazy.shape != expected or len(lazy.shape) not in (1, 2):
                    raise SpecError(
                        f"{path}: {name} of {part.id} has shape {list(lazy.shape)}, and the inputs of {slot.name} are "
                        f"{part.shape[-1]} wide: they were measured with another model",
                        hint=f"llmkit quantize observe {ckpt.origin or ckpt.label} -o FILE measures them anew",
                    )
    strange = [name for name in statistics.parts if name not in model.stored_in]
    if strange:
        raise SpecError(f"{path} has statistics of {listing(strange, 3)}, which {ckpt.label} does not have")
    return statistics


def _own(path: Path) -> StoredStatistics:
    tensors, metadata = safetensors.read(path)
    if KEY not in metadata:
        raise InputError(
            f"{path} holds no statistics: its metadata have no {KEY}", hint="llmkit quantize observe MODEL -o FILE"
        )
    about = parse_object(metadata[KEY], f"{path}: {KEY}")
    n_tokens = about.get("tokens")
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 1:
        raise InputError(f"{path}: {KEY} has tokens {json.dumps(n_tokens)[:40]}; expected a positive number")
    parts: dict[str, dict[str, Lazy]] = {}
    for name, lazy in tensors.items():
        weight, _, part = name.rpartition(".")
        if part not in _FIELDS or not lazy.dtype.is_float:
            raise InputError(f"{path}: tensor {name!r} is no statistic; expected {' or '.join(_FIELDS)} in floats")
        parts.setdefault(weight, {})[part] = lazy
    return StoredStatistics(path.name, parts, dict.fromkeys(parts, float(n_tokens)), about)


def _from_imatrix(path: Path, matrix: imatrix.Imatrix, ckpt: Checkpoint, model: Model) -> StoredStatistics:
    slots = {slot.name: slot for slot in gguf_spelling(ckpt, model).slots.values()}
    apart = _stacked_in_files(ckpt, slots.values())
    parts: dict[str, Mapping[str, Lazy]] = {}
    n_tokens: dict[str, float] = {}
    for name, entry in matrix.entries.items():
        slot = slots.get(name)
        if slot is None:
            raise SpecError(f"{path} has importance of {name}, which {ckpt.label} does not have")
        if slot.id in apart:
            continue
        matrices = [slot.of_stack(e) for e in range(slot.stack)] if slot.stack else [slot]
        if len(entry.counts) != len(matrices):
            raise SpecError(f"{path}: {name} has {len(entry.counts)} counts, expected one for each of {len(matrices)}")
        for i, (each, count) in enumerate(zip(matrices, entry.counts, strict=True)):
            if count > 0:
                squares = reshape(TakeRows(entry.sums, i, i + 1).output(), (entry.sums.shape[1],))
                parts |= {part.id: {"squares": squares} for part in each.parts}
                n_tokens |= {part.id: count for part in each.parts}
    return StoredStatistics(path.name, parts, n_tokens, {"datasets": list(matrix.datasets)})


def _stacked_in_files(ckpt: Checkpoint, slots: Iterable[Slot]) -> set[str]:
    """The ids of matrices that files have head by head, which may see other inputs than the whole matrix."""
    family = require(ckpt.config, ckpt.label).gguf
    forms = family.forms if family is not None else {}
    return {slot.id for slot in slots if (form := forms.get(leaf_of(slot.id))) is not None and len(form.shape) == 3}


def gguf_spelling(ckpt: Checkpoint, model: Model) -> Model:
    """The model with the names that its tensors have in GGUF files.

    Raises:
        RequirementError: llama.cpp does not know the family.
    """
    family = require(ckpt.config, ckpt.label).gguf
    if family is None:
        raise RequirementError(
            f"{ckpt.label}: llama.cpp does not know its architecture, and has no names for its tensors",
            hint="llmkit quantize observe MODEL -o FILE.safetensors keeps statistics of any",
        )
    return model.spelled(family.names)
