"""Is this the base that the delta was made for? Judged by names, shapes, dtypes and small files, without data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.model import Model
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import MARKER_NAME, classify
from llmkit.checkpoint.manifest import recipe_of
from llmkit.errors import InputError, LlmkitError, PluginError, RequirementError
from llmkit.formats.json_text import parse_object
from llmkit.tensors.spec import DType
from llmkit.tokenization.sentencepiece_model import SentencePieceModel
from llmkit.transforms.delta.detect import embedding_rows, main_dtype
from llmkit.transforms.delta.marker import Marker, is_of_specs, is_recorded_base
from llmkit.transforms.delta.profiles import NewRows, Profile

_LAYER = re.compile(r"^.*?\.(\d+)\.", re.MULTILINE)
_DELTA_WORD = re.compile(r"(^|[-_./ ])(w?diff|delta)s?($|[-_./ 0-9v])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Finding:
    """Evidence against a base.

    Attributes:
        level: `refuse` (certain), `warn` (statistics, or a name), `note`.
        code: a stable word for `--json`.
        message: what, where, found and expected.
        hint: what to do.
        measured: the figure behind it.
        threshold: what it was compared with.
        can_force: whether `--force` can go on regardless.
    """

    level: str
    code: str
    message: str
    hint: str | None = None
    measured: float | None = None
    threshold: float | None = None
    can_force: bool = True

    @property
    def words(self) -> str:
        """The message of a finding that stops nothing, with what to do."""
        forced = "forced: " if self.level == "refuse" else ""
        return forced + self.message + (f"; {self.hint}" if self.hint and self.level == "warn" else "")


def raise_refusals(findings: Iterable[Finding], *, force: bool = False) -> None:
    """Raise the first refusal that `force` does not override; the others are named in its message.

    Raises:
        RequirementError: there is one.
    """
    refusals = [f for f in findings if f.level == "refuse" and not (force and f.can_force)]
    if refusals:
        first = refusals[0]
        rest = f"; besides, {'; '.join(f.message for f in refusals[1:])}" if len(refusals) > 1 else ""
        hint = first.hint or ""
        if first.can_force:
            hint = f"{hint}; --force goes on regardless" if hint else "--force goes on regardless"
        raise RequirementError(first.message + rest, hint=hint or None)


def bound_model(checkpoint: Checkpoint) -> Model | None:
    """The architecture bound to the config; None where no plugin describes it or the config is incomplete."""
    try:
        return checkpoint.model
    except PluginError:
        raise
    except LlmkitError:
        return None


def size_of(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(layers, width) from names and shapes alone; None when the names carry no layer numbers."""
    layers = {int(number) for number in set(_LAYER.findall("\n".join(checkpoint.tensors)))}
    specs = checkpoint.specs
    widths = Counter([spec.shape[0] for name, spec in specs.items() if len(spec.shape) == 1 and "norm" in name])
    if not widths:
        widths.update([spec.shape[-1] for spec in specs.values() if len(spec.shape) == 2])
    return (len(layers), widths.most_common(1)[0][0]) if layers and widths else None


def judge_structure(base: Checkpoint, delta: Checkpoint, profile: Profile | None) -> list[Finding]:
    """Findings about the pair, the most telling first. `profile` None is llmkit's own."""
    return [
        *_same(base, delta), *_size(base, delta), *_family(base, delta, profile),
        *_delta_as_base(base, delta), *_tuned(base, delta, profile), *_vocabulary(base, delta, profile),
        *_tokenizer(base, delta), *_rounded(base), *_marked(base, delta),
    ]  # fmt: skip


def _same(base: Checkpoint, delta: Checkpoint) -> list[Finding]:
    if base.origin is None or delta.origin is None or base.origin.resolve() != delta.origin.resolve():
        return []
    message = f"both models are the same: {base.origin}"
    return [Finding("refuse", "same", message, "give two: the base model first", can_force=False)]


def _size(base: Checkpoint, delta: Checkpoint) -> list[Finding]:
    have, need = size_of(base), size_of(delta)
    if have is None or need is None or have == need:
        return []
    message = (
        f"{base.label} is not the base of {delta.label}: it has {have[0]} layers of width {have[1]}, "
        f"the delta was made for {need[0]} layers of width {need[1]}"
    )
    return [Finding("refuse", "size", message, "give the base of the delta's size", can_force=False)]


def _architecture(config: Any) -> str | None:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else config.get("model_type")


def _family(base: Checkpoint, delta: Checkpoint, profile: Profile | None) -> list[Finding]:
    have, need = _architecture(base.config), _architecture(delta.config)
    if have is None or need is None or have.lower() == need.lower():
        return []
    if profile is None or profile.changes_family:
        return []
    message = f"{base.label} is of another family: it is a {have}, {delta.label} was made for {need}"
    return [Finding("refuse", "family", message, "give the base that the delta's model card names")]


def _delta_as_base(base: Checkpoint, delta: Checkpoint) -> list[Finding]:
    contents = classify(base)
    if contents.kind == "delta":
        message = f"{base.label} is a delta itself ({contents.words}); the first argument is the base model"
        return [Finding("refuse", "delta_as_base", message, "llmkit delta apply BASE DELTA -o OUT", can_force=False)]
    if _DELTA_WORD.search(base.label) and not _DELTA_WORD.search(delta.label):
        message = f"base {base.label} is called a delta, and delta {delta.label} is not: were they swapped?"
        return [Finding("warn", "delta_as_base", message, "llmkit delta apply BASE DELTA -o OUT")]
    return []


def _tuned(base: Checkpoint, delta: Checkpoint, profile: Profile | None) -> list[Finding]:
    recipe = recipe_of(base.origin) if base.origin is not None and base.origin.is_dir() else ()
    applied = [str(s.get("delta")) for s in recipe if s.get("transform") == "delta.apply"]
    if applied and not is_recorded_base(base, delta):
        message = f"{base.label} is already tuned: llmkit applied the delta {applied[-1]} to it"
        return [Finding("refuse", "tuned", message, "give the untouched base")]
    rows, base_rows = embedding_rows(delta), embedding_rows(base)
    grows = profile is not None and profile.new_rows in (NewRows.MEAN, NewRows.ZERO)
    added = _added_ids(delta, rows)
    if grows and rows == base_rows and added and _added_ids(base, rows) == added:
        message = (
            f"{base.label} is already tuned or extended: its embedding has the {len(added)} rows "
            f"(of {rows}) that {delta.label} adds; the base should have {rows - len(added) if rows else 0}"
        )
        return [Finding("refuse", "tuned", message, "give the base as it was released")]
    return []


def _added_ids(checkpoint: Checkpoint, rows: int | None) -> list[int]:
    """Ids of added tokens at the very end of the vocabulary."""
    content = checkpoint.files.get("added_tokens.json")
    if content is None or rows is None:
        return []
    try:
        ids = sorted(int(i) for i in parse_object(content.read(), "added_tokens.json").values())
    except (InputError, ValueError, TypeError):
        return []
    return ids if ids and ids == list(range(rows - len(ids), rows)) else []


def _vocabulary(base: Checkpoint, delta: Checkpoint, profile: Profile | None) -> list[Finding]:
    rows, base_rows = embedding_rows(delta), embedding_rows(base)
    if profile is None or rows is None or base_rows is None or rows == base_rows:
        return []
    if rows < base_rows:
        message = (
            f"{base.label} has another vocabulary: {base_rows} rows, {delta.label} was made for {rows} or fewer; "
            "it is an extended or already tuned model"
        )
        return [Finding("refuse", "vocabulary", message, "give the base as it was released", can_force=False)]
    takes_rows = profile.new_rows is not NewRows.NONE or profile.other_shapes is not None or profile.rules
    if not takes_rows:
        message = (
            f"{base.label} has another vocabulary: {base_rows} rows, {delta.label} has {rows}, "
            f"and profile {profile.name} adds none"
        )
        hint = "check the base, or force a profile that adds rows: --profile vicuna-v0 (zero) or alpaca (mean)"
        return [Finding("refuse", "vocabulary", message, hint, can_force=False)]
    return []


def _tokenizer(base: Checkpoint, delta: Checkpoint) -> list[Finding]:
    if embedding_rows(base) != embedding_rows(delta):
        return []
    for name in ("tokenizer.model", "vocab.json"):
        if name in base.files and name in delta.files:
            theirs, ours = (c.files[name].read() for c in (base, delta))
            if theirs == ours or _entries(name, theirs) == _entries(name, ours):
                return []
            message = f"{name} of {base.label} and {delta.label} differ, though both vocabularies have the same size"
            return [Finding("warn", "tokenizer", message, "check that the base is the one the model card names")]
    return []


def _entries(name: str, data: bytes) -> object:
    """What a vocabulary file holds, however it is written (a GGUF base has its pieces alone); its bytes if unread."""
    try:
        return SentencePieceModel.parse(data, name).pieces if name.endswith(".model") else parse_object(data, name)
    except InputError:
        return data


def _rounded(base: Checkpoint) -> list[Finding]:
    stated = base.config.get("dtype") or base.config.get("torch_dtype")
    if main_dtype(base) is not DType.BF16 or stated not in ("float16", "torch.float16"):
        return []
    message = (
        f"{base.label} stores bfloat16 though its config says float16: a conversion that rounded the weights; "
        "the result will differ from the published model in the low bits"
    )
    return [Finding("warn", "bf16_rounded", message, "convert the original float16 files again")]


def _marked(base: Checkpoint, delta: Checkpoint) -> list[Finding]:
    if MARKER_NAME not in delta.files:
        return []
    marker = Marker.of(delta)
    if is_of_specs(base.tensors, marker.base_specs):
        return []
    message = (
        f"{base.label} has other names, dtypes or shapes than the base the delta was made from "
        f"({marker.base_label}, {marker.base_n_tensors} tensors; found {len(base.tensors)})"
    )
    return [Finding("refuse", "specs", message, f"give {marker.base_label} as it was when the delta was made")]
