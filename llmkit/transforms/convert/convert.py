"""Convert: the same weights in another file layout, or in another float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import MARKER_NAME, classify, require_model
from llmkit.checkpoint.quantized import dequantized, describe, is_quantized, model_dtype, refuse_unread
from llmkit.checkpoint.statistics import StoredStatistics
from llmkit.errors import InputError, RequirementError, suggestion
from llmkit.quantization.codec import command_for, config_entry
from llmkit.tensors.spec import DType
from llmkit.transforms.convert.casting import CAST_DTYPES, Overflow, cast, config_with_dtype
from llmkit.transforms.convert.native import as_architecture
from llmkit.transforms.convert.targets import Target, targets
from llmkit.transforms.recipe import recipe_attrs


def convert(
    ckpt: Checkpoint,
    *,
    to: str = "hf",
    dtype: str | DType | None = None,
    architecture: str | None = None,
    overflow: Overflow | None = None,
    **options: Any,
) -> Checkpoint:
    """The checkpoint in another layout; every layout that opens can be converted.

    A quantized checkpoint is dequantized where a dtype is asked for, where the layout holds floats only, or where its
    config.json does not say that it is quantized.

    Args:
        to: a name of `targets()`.
        dtype: store floats as float32, float16 or bfloat16 (default: as they are).
        architecture: store it as this one, where it computes the same (`llmkit.transforms.convert.native`).
        overflow: counts values that the new dtype cannot hold, while they are written.
        options: of the layout.

    Raises:
        InputError: no such layout, dtype or option.
        SpecError, RequirementError: a checkpoint that the layout cannot hold.
    """
    target = _target(to)
    for name in options:
        if name not in target.options:
            homes = [f"--to {n}" for n, t in targets().items() if name in t.options]
            raise InputError(
                f"--to {to} has no option --{name.replace('_', '-')}; it goes with {' or '.join(homes) or 'no layout'}",
                hint=f"leave it out, or write {homes[0]}" if homes else "leave it out",
            )
    wanted = _dtype(dtype)
    if wanted is not None and target.counts_overflow:
        raise InputError(f"--to {to} stores matrices as --type says, not --dtype", hint="--type f16")
    chosen = {"dtype": wanted.torch_name if wanted else None, "as": architecture}
    step: dict[str, Any] = {"transform": "convert", "to": to, **{k: v for k, v in chosen.items() if v}}
    step |= {name: _plain(value) for name, value in options.items()}
    ckpt = _checked(ckpt)
    is_stated = config_entry(ckpt.config) is not None  # what config.json does not tell of, nothing else would load
    if is_quantized(ckpt) and (wanted is not None or not target.takes_quantized or not is_stated):
        note = f"dequantized from {describe(ckpt)}"
        # Rounded once, as the layout's library does at that dtype; but what a narrower one cannot hold the cast counts.
        is_narrower = wanted is DType.F16 and model_dtype(ckpt.config) is not DType.F16
        ckpt = dequantized(ckpt, dtype=DType.F32 if is_narrower else wanted).derive(notes=[note])
    if architecture is not None:
        ckpt = as_architecture(ckpt, architecture)
    if wanted is not None:
        tensors = cast(ckpt.tensors, wanted, overflow if overflow is not None else Overflow())
        config = config_with_dtype(ckpt.config, wanted) if ckpt.config else {}
        ckpt = ckpt.derive(tensors=tensors, config=config)
    if target.counts_overflow:
        options["overflow"] = overflow
    return target.write(ckpt.derive(step=step), **options)


def _checked(ckpt: Checkpoint) -> Checkpoint:
    """The checkpoint, if it can be converted: no adapter, and quantized in no way that is not read.

    A delta in floats may change its layout, and stays a delta; one that counts ulps belongs to its own layout.
    """
    contents = classify(ckpt)
    if contents.kind == "delta" and MARKER_NAME not in ckpt.files:
        return ckpt.derive(
            warnings=[f"{ckpt.label} is {contents.words}: what is written is one, too ({contents.hint})"]
        )
    if ckpt.layout == "gguf" and not ckpt.config and contents.kind == "model":
        raise RequirementError(
            f"{ckpt.label}: no plugin describes the architecture of this GGUF file, so its tensors have no names in "
            "another layout, and no config can be made",
            hint="take the model in the layout that it was published in; `llmkit inspect` shows what is in the file",
        )
    require_model(ckpt, "convert", floats=ckpt.layout == "onnx")  # the integers of a graph belong to it alone
    if contents.quantization is not None:
        refuse_unread(ckpt)
    return ckpt


def _plain(option: Any) -> Any:
    """An option as the history has it."""
    if isinstance(option, StoredStatistics):
        return option.attrs()
    return recipe_attrs(option) if isinstance(option, Mapping) else option


def _target(to: str) -> Target:
    names = targets()
    if to in names:
        return names[to]
    raise InputError(
        f"--to {to!r} is no layout that llmkit writes; expected {', '.join(names)}",
        hint=command_for(to)
        or suggestion(to, names, "--to hf writes safetensors, --to gguf a file for llama.cpp", "--to "),
    )


def _dtype(dtype: str | DType | None) -> DType | None:
    if dtype is None:
        return None
    parsed = DType.parse(dtype) if isinstance(dtype, str) else dtype
    if parsed not in CAST_DTYPES:
        names = ", ".join(d.torch_name for d in CAST_DTYPES)
        raise InputError(f"--dtype {parsed.torch_name}: weights are stored as {names}", hint="--dtype float16")
    return parsed
