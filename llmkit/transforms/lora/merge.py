"""Merging adapters into a base: a pure function, one adapter after the other, no tensor data read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.quantized import dequantized, is_quantized
from llmkit.errors import RequirementError, SpecError
from llmkit.formats.adapter import Adapter
from llmkit.quantization.quality import Meter
from llmkit.tensors.spec import DType
from llmkit.transforms.convert.casting import config_with_dtype
from llmkit.transforms.lora.apply import Application
from llmkit.transforms.lora.bases import doubt
from llmkit.transforms.lora.requantize import require_quantized, with_stored
from llmkit.transforms.vocab.config_ids import with_vocab_size


def merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    dtype: DType | str | None = None,
    meter: Meter | None = None,
    force: bool = False,
    requantize: bool = False,
) -> Checkpoint:
    """The base with adapters merged into its weights, in the given order.

    The bits are those of PEFT's `merge_and_unload`: updates are computed in float32 and rounded where PEFT rounds
    (`arithmetic`), then added and cast to the dtype that the weight is stored in. Several adapters are merged one after
    the other, each on what the one before would have written, so that one call gives the bytes of as many calls
    through disk.

    Args:
        weights: a factor for each adapter's update; for adapters that only add to weights (LoRA, LoHa, LoKr, AdaLoRA).
        dtype: of all floats of the result, to which the base is cast before anything is added, as it is where a model
            is loaded in that dtype; None keeps what each tensor has.
        meter: collects how large the change of every weight is, |W' - W| / |W| (Frobenius), while it is written; with
            several adapters the names begin with the adapter's.
        force: go on where the counts or the config of an adapter say that it does not belong to this base.
        requantize: weights of a quantized base that an adapter changes are restored, changed and rounded to the grid
            that they were on; the others keep their codes in any case.

    Raises:
        SpecError: a module or shape that the base does not have.
        RequirementError: quantized weights that an adapter changes (without `requantize`), a vocabulary that does not
            fit, or a weight that has no meaning.
    """
    if requantize or is_quantized(base):
        reader, floats = require_quantized(base), dequantized(base)
        merged = merge(floats, adapters, weights=weights, dtype=dtype, meter=meter, force=force)
        return with_stored(base, floats, merged, reader, requantize=requantize)
    if not adapters:
        raise RequirementError("no adapter to merge", hint="llmkit lora merge BASE ADAPTER -o OUT")
    require_model(base, "lora merge", floats=True)
    factors = list(weights) if weights else [1.0] * len(adapters)
    if len(factors) != len(adapters):
        raise RequirementError(
            f"{len(factors)} weights for {len(adapters)} adapters", hint="give one --weight for each adapter, or none"
        )
    target = DType.parse(dtype) if isinstance(dtype, str) else dtype
    merged = base if target is None else _in_dtype(base, target)
    for i, (adapter, factor) in enumerate(zip(adapters, factors, strict=True)):
        prefix = f"{adapter.label}: " if len(adapters) > 1 else ""
        merged = _merge_one(merged, adapter, factor, target if i == 0 else None, meter, prefix, force)
    return merged


def _in_dtype(base: Checkpoint, dtype: DType) -> Checkpoint:
    """The base with its floats cast, and a note where that rounds."""
    floats = {n: t for n, t in base.tensors.items() if t.dtype.is_float}
    tensors = {**base.tensors, **{n: t.cast(dtype) for n, t in floats.items()}}
    wider = sorted(
        {t.dtype.torch_name for t in floats.values() if t.dtype.itemsize >= dtype.itemsize} - {dtype.torch_name}
    )
    if wider:
        notes = [
            f"--dtype {dtype.torch_name}: the weights ({', '.join(wider)}) are rounded before the updates are added, "
            "and the sums again: the bits of a model loaded in that dtype and merged"
        ]
        return replace(base, tensors=tensors, notes=(*base.notes, *notes))
    return replace(base, tensors=tensors)


def _merge_one(
    ckpt: Checkpoint,
    adapter: Adapter,
    factor: float,
    dtype: DType | None,
    meter: Meter | None,
    prefix: str,
    force: bool,
) -> Checkpoint:
    if factor != 1.0:
        _refuse_factor(adapter, factor)
    work = Application(ckpt, adapter, factor, meter, prefix, force)
    tensors, said = work.run(), None if work.warnings else doubt(ckpt, adapter)
    step: dict[str, Any] = {"transform": "lora.merge", "adapter": adapter.label, "kind": adapter.kind.lower()}
    if factor != 1.0:
        step["weight"] = factor
    if dtype is not None:
        step["dtype"] = dtype.torch_name
    return ckpt.derive(
        tensors=tensors,
        config=_config(ckpt.config, work, dtype),
        files=work.files,
        step=step,
        notes=[*adapter.notes, *work.notes],
        warnings=[*adapter.warnings, *work.warnings, *([said] if said is not None else [])],
    )


def _refuse_factor(adapter: Adapter, factor: float) -> None:
    reason = None
    if adapter.kind == "IA3":
        reason = "IA3 multiplies weights"
    elif any("lora_magnitude_vector" in p for p in adapter.modules.values()):
        reason = "DoRA rescales weights"
    elif len(adapter.replacements) > len(adapter.base_copies) or adapter.tokens:
        reason = "it replaces whole tensors or rows"
    if reason is not None:
        raise RequirementError(
            f"{adapter.label}: a weight of {factor} has no meaning here: {reason}; only what is added can be scaled",
            hint="leave --weight out for this adapter",
        )
    if not abs(factor) < float("inf"):
        raise SpecError(f"weight {factor} is not a finite number")


def _config(config: Mapping[str, Any], work: Application, dtype: DType | None) -> dict[str, Any]:
    changed = dict(config)
    if not changed:
        return changed
    if work.n_rows is not None:
        changed = with_vocab_size(changed, work.n_rows)
    if work.unties:
        changed["tie_word_embeddings"] = False
    changed.update(work.config_changes)
    return changed if dtype is None else config_with_dtype(changed, dtype)
