"""Weight deltas: `apply` adds one to its base, `make` takes the difference. Pure; no tensor data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import MARKER_NAME, classify, require_model
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import RequirementError, listing
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.transforms.convert.casting import config_with_dtype
from llmkit.transforms.delta.base_structure import judge_structure, raise_refusals, size_of
from llmkit.transforms.delta.checksum import expected_sums
from llmkit.transforms.delta.detect import Detection, detect, embedding_rows
from llmkit.transforms.delta.marker import Marker
from llmkit.transforms.delta.merge import Merge
from llmkit.transforms.delta.profiles import find_profile
from llmkit.transforms.vocab.config_ids import with_vocab_size

# Files of a delta that say something of the delta, not of the model it gives.
_OF_THE_DELTA = (MARKER_NAME, "model_sum.txt", "README.md")


def apply(
    base: Checkpoint,
    delta: Checkpoint,
    *,
    profile: str | None = None,
    dtype: DType | str | None = None,
    expected_sum: float | None = None,
    force: bool = False,
) -> Checkpoint:
    """The model that `delta` makes of `base`, with the delta's config and (by the profile) its tokenizer.

    Args:
        profile: name of the convention; None detects it. The choice and its reason are in the notes.
        dtype: dtype of the result; None is what the published script writes.
        expected_sum: the sum over all weights that the release states, to be compared after the run.
        force: go on where a check refuses the base, when the arithmetic is still defined.

    Raises:
        RequirementError: the base is not the one the delta was made from, or the profile cannot be told.
        SpecError: names or shapes that the profile has no rule for.
    """
    _check_kinds(base, delta)
    detection = _choose(base, delta, profile)
    findings = judge_structure(base, delta, detection.profile)
    raise_refusals(findings, force=force)
    chosen = DType.parse(dtype) if isinstance(dtype, str) else dtype
    merge = Merge(base, delta, chosen, force)
    tensors = merge.ulps(Marker.of(delta)) if detection.profile is None else merge.floats(detection.profile)
    notes = [_chosen_note(detection, forced=profile is not None), *merge.notes]
    step: dict[str, Any] = {
        "transform": "delta.apply",
        "base": base.label,
        "delta": delta.label,
        "profile": detection.name,
    }
    if chosen is not None:
        step["dtype"] = chosen.torch_name
    sums = expected_sums(detection.name, delta, tensors, expected_sum)
    if sums:
        step["expected_sums"] = [asdict(s) for s in sums]
        notes.append(f"the sum of all weights will be compared with {sums[0].value} ({sums[0].label})")
    files, file_notes, file_warnings = _files(
        base, delta, "delta" if detection.profile is None else detection.profile.tokenizer
    )
    return base.derive(
        tensors=tensors,
        config=_config(base, delta, tensors),
        files=files,
        step=step,
        notes=[*delta.notes, *notes, *file_notes],
        warnings=[*delta.warnings, *(f.words for f in findings if f.level != "note"), *merge.warnings, *file_warnings],
    )


def make(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    profile: str | None = None,
    dtype: DType | str | None = None,
    force: bool = False,
) -> Checkpoint:
    """The delta from `base` to `tuned`.

    Args:
        profile: None or `llmkit` counts ulps: as large as the tuned model, and applying it gives every bit back.
            The name of a published convention makes what its script makes, with its rounding.
        dtype: for a published convention, the dtype the delta is stored in; None is the script's.
        force: go on where a check refuses the pair, when the arithmetic is still defined.

    Raises:
        RequirementError: the two do not belong together.
        SpecError: names or shapes that the profile has no rule for.
    """
    require_model(base, "delta make", floats=True)
    require_model(tuned, "delta make", floats=True)
    rules = None if profile in (None, "llmkit") else find_profile(profile or "")
    findings = [f for f in judge_structure(base, tuned, rules) if f.code not in ("tuned", "bf16_rounded")]
    raise_refusals(findings, force=force)
    if rules is None and dtype is not None:
        raise RequirementError(
            "profile llmkit stores integers that count ulps; a dtype has no meaning for it",
            hint="leave --dtype out, or name a published profile: --profile vicuna",
        )
    step = {"transform": "delta.make", "base": base.label, "tuned": tuned.label}
    split = Merge(base, tuned, DType.parse(dtype) if isinstance(dtype, str) else dtype, force)
    files = dict(tuned.files)
    if rules is None:
        tensors, marker = split.ulp_differences()
        files[MARKER_NAME] = marker.file()
        split.notes.append("profile llmkit: differences in ulps; applying the delta gives every bit of the tuned model")
    else:
        tensors = split.differences(rules)
        split.notes.append(
            f"profile {rules.name} ({rules.releases}): {rules.describe()}; a weight comes back within one ulp where "
            "its delta is at most twice as large as itself, less exactly elsewhere (profile llmkit has no such limit)"
        )
    return tuned.derive(
        tensors=tensors,
        config=dict(tuned.config) if rules is None else _config(base, tuned, tensors),
        files=files,
        step={**step, "profile": "llmkit" if rules is None else rules.name},
        notes=[*base.notes, *split.notes],
        warnings=[*base.warnings, *(f.words for f in findings if f.level != "note"), *split.warnings],
    )


def _check_kinds(base: Checkpoint, delta: Checkpoint) -> None:
    if classify(base).kind != "delta":  # the check of the base says that the two are swapped
        require_model(base, "delta apply", floats=True)
    contents = classify(delta)
    if contents.kind not in ("delta", "model") or contents.quantization is not None:
        raise RequirementError(
            f"{delta.label} is {contents.words}; delta apply wants a delta of float weights",
            hint=contents.hint or "give the delta as it was published",
        )


def _choose(base: Checkpoint, delta: Checkpoint, profile: str | None) -> Detection:
    if profile is None:
        have, need = size_of(base), size_of(delta)
        if have is not None and need is not None and have != need:
            # The size tells more than a profile that cannot be told because of it.
            raise_refusals(judge_structure(base, delta, None))
        return detect(base, delta)
    if profile == "llmkit":
        Marker.of(delta)
        return Detection(None, "forced")
    if MARKER_NAME in delta.files:
        raise RequirementError(
            f"{delta.label} is a delta of profile llmkit ({MARKER_NAME}); profile {profile} cannot read it",
            hint="leave --profile out",
        )
    return Detection(find_profile(profile), "forced")


def _chosen_note(detection: Detection, *, forced: bool) -> str:
    how = "forced" if forced else f"detected: {detection.reason}"
    if detection.profile is None:
        return f"profile llmkit ({how}): differences in ulps, every bit of the tuned model comes back"
    text = f"profile {detection.name} ({how}): {detection.profile.describe()}"
    if detection.alternatives:
        text += f"; if that is wrong, force {listing(detection.alternatives)}"
    return text + (f". {detection.profile.caveat}" if detection.profile.caveat else "")


def _config(base: Checkpoint, delta: Checkpoint, tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """The delta's config (it knows the vocabulary) with the dtype that is written."""
    config = dict(delta.config or base.config)
    if base.config:  # the name of the repository can tell releases apart, and the base's is the true one
        config.pop("_name_or_path", None)
        config |= {k: v for k, v in base.config.items() if k == "_name_or_path"}
    rows = embedding_rows(delta)
    if config and not delta.config and rows is not None:
        config = with_vocab_size(config, rows)
    written = {t.dtype for t in tensors.values() if t.dtype.is_float}
    return config_with_dtype(config, written.pop()) if config and len(written) == 1 else config


def _files(base: Checkpoint, delta: Checkpoint, side: str) -> tuple[dict[str, FileContent], list[str], list[str]]:
    first, second = (delta, base) if side == "delta" else (base, delta)
    owner = first if first.tokenizer_files else second
    files = {k: v for k, v in base.files.items() if k not in base.tokenizer_files and k not in _OF_THE_DELTA}
    files |= {k: v for k, v in delta.files.items() if k not in delta.tokenizer_files and k not in _OF_THE_DELTA}
    files |= owner.tokenizer_files
    if not owner.tokenizer_files:
        return files, [], ["neither side has tokenizer files: add them before the model is used"]
    if owner is not first:
        return files, [], [f"{first.label} has no tokenizer files: those of {second.label} are taken"]
    return files, [f"tokenizer from the {side} ({owner.label})"], []
