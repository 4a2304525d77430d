"""What a checkpoint is: a model, a delta, an adapter; quantized or not. The one place that decides it.

Told from tensors, manifests and headers, so that what a folder is called or what its config.json claims decides nothing
alone. A command that wants something else says what it was given, and which command works on that.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.differences import looks_like_differences
from llmkit.checkpoint.manifest import recipe_of
from llmkit.errors import LlmkitError, RequirementError
from llmkit.formats import imatrix
from llmkit.formats.adapter_files import CONFIG_NAME
from llmkit.formats.adapter_names import adapter_parts, with_words
from llmkit.formats.folder import left_unread
from llmkit.formats.json_text import parse_object, read_object
from llmkit.quantization.codec import readers_by_method
from llmkit.quantization.recognition import BLOCKS, Quantization, find_quantization
from llmkit.tensors.spec import DType

MARKER_NAME = "llmkit_delta.json"
_OTHER_ADAPTERS = (
    "adapter_query", "adapter_wte", "adapter_scale", "gating_factor", ".lora_", "_lora.down.", "_lora.up."
)  # fmt: skip
_ASSUMED = {"transform": "assume.model"}  # a step of the recipe: the user says so
_STATES = (".exp_avg", ".exp_avg_sq", ".momentum_buffer")
_MEASURED = (".second_moments", ".cross_moments", ".squares", ".maxima", ".inputs")  # quantize observe
_DISTRIBUTIONS = {"codes", "high", "step", "top", "nll"}  # perplexity --reference


@dataclass(frozen=True)
class Classification:
    """What a checkpoint is.

    Attributes:
        kind: `model` is whatever has the tensors of one; `several` is a model and an adapter, of which transformers
            loads another than the folder's weights; `addition` is heads or layers that work beside a model alone.
        words: what to call it in a message (`a LoRA adapter of rank 8 for llama-7b`).
        hint: a command, or an action, that works on it.
        quantization: how its weights are quantized; None for floats.
    """

    kind: Literal["model", "delta", "adapter", "addition", "optimizer", "several", "measurements"]
    words: str
    hint: str
    quantization: Quantization | None = None


def quantization_of(ckpt: Checkpoint) -> Quantization | None:
    """How the weights are quantized; None for floats. The blocks of a GGUF count, although it opens as floats."""
    types: Mapping[str, Mapping[str, int]] = ckpt.details.get("types", {})
    blocks = {name: entry["tensors"] for name, entry in types.items() if name not in DType.__members__}
    if blocks:
        words = ", ".join(f"{name} × {n}" for name, n in blocks.items())
        return Quantization(BLOCKS, words, "the types in its header", n_weights=sum(blocks.values()))
    specs = ckpt.specs
    if ckpt.layout == "onnx":  # its config may speak of how the source was quantized
        return find_quantization({name: spec for name, spec in specs.items() if name.endswith(".weight_codes")}, {})
    return find_quantization(specs, ckpt.config)


def classify(ckpt: Checkpoint) -> Classification:
    """What a checkpoint is. Reads no tensor data but a few values of norms, which tell a delta from a model."""
    return ckpt.once(_classified)


def _classified(ckpt: Checkpoint) -> Classification:
    where = shlex.quote(str(ckpt.origin or ckpt.label))
    return _delta(ckpt, where) or _adapter(ckpt, where) or _weights(ckpt, where)


def _delta(ckpt: Checkpoint, where: str) -> Classification | None:
    """A delta that llmkit made: its marker says so, or the recipe in its manifest. Others show in their data only."""
    history = ckpt.history
    if ckpt.origin is not None and ckpt.origin.is_file():
        history = recipe_of(ckpt.origin.parent)
    transforms = [step.get("transform") for step in history]
    applied = max((i for i, name in enumerate(transforms) if name == "delta.apply"), default=-1)
    step = next((s for s in history[applied + 1 :] if s.get("transform") == "delta.make"), None)
    marker = _beside(ckpt, MARKER_NAME)
    if step is None and marker is None:
        return None
    base = (step or {}).get("base") or "BASE"
    if marker and isinstance(marker.get("base"), dict):
        base = marker["base"].get("label") or base
    words = f"a delta, differences from {'its base' if base == 'BASE' else base}"
    return Classification("delta", words, f"llmkit delta apply {shlex.quote(str(base))} {where} -o OUT makes the model")


def _weights(ckpt: Checkpoint, where: str) -> Classification:
    if any(name.endswith(_STATES) for name in ckpt.tensors):
        return Classification(
            "optimizer", "the state of an optimizer, not weights", "give the model's own weight files"
        )
    if (measured := _measurements(ckpt.tensors, where)) is not None:
        return measured
    if (addition := _addition(ckpt)) is not None:
        return addition
    quantization = quantization_of(ckpt)
    if quantization is None and _ASSUMED not in ckpt.history and looks_like_differences(ckpt):
        words = "a delta by its norms, whose weights are small and of both signs"
        hint = f"llmkit delta apply BASE {where} -o OUT makes the model; commands that write OUT take it for a model "
        return Classification("delta", words, f"{hint}with --force")
    words = f"a quantized model ({quantization})" if quantization else "a model"
    return Classification("model", words, "", quantization)


def _addition(ckpt: Checkpoint) -> Classification | None:
    """What works beside a model only: a GGUF that says so, or heads whose config names a base and no architecture."""
    config, kind = ckpt.config, ckpt.details.get("metadata", {}).get("general.type")
    if isinstance(kind, str) and kind != "model":  # mmproj: the encoder of images or sounds
        words = f"a GGUF file of type {kind}, which belongs to a model and is none"
        return Classification("addition", words, "give the file of the model itself")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or any(config.get(key) for key in ("architectures", "model_type")):
        return None
    words = f"an addition to {base} (such as heads that draft tokens), no model: its config names no architecture"
    return Classification("addition", words, f"give the model itself: {shlex.quote(base)}")


def _measurements(names: Collection[str], where: str) -> Classification | None:
    """What llmkit or llama.cpp measured of a model, by the names in the file; None for weights."""
    if names and all(name.endswith((*_MEASURED, imatrix.SUMS, imatrix.COUNTS)) for name in names):
        hint = f"llmkit quantize MODEL --statistics {where} --bits 4 -o OUT reads it"
        return Classification("measurements", "statistics of the inputs of a model's layers, not weights", hint)
    if set(names) >= _DISTRIBUTIONS:
        hint = f"llmkit perplexity MODEL --text FILE --reference {where} compares a model with it"
        return Classification("measurements", "a reference of llmkit perplexity, a model's distributions", hint)
    return None


def open_model(model: str | Path, *, force: bool) -> Checkpoint:
    """Open a checkpoint; with `force` it is a model although the values of its norms are those of a delta.

    That is a step of its recipe, so that what is made of it is a model, too.
    """
    ckpt = open_checkpoint(model)
    forced = replace(ckpt, history=(*ckpt.history, _ASSUMED))
    if not force or classify(ckpt).kind == classify(forced).kind:
        return ckpt
    warning = f"forced: {ckpt.label} is {classify(ckpt).words}; it is taken for a model"
    return replace(forced, warnings=(*forced.warnings, warning))


def require_model(ckpt: Checkpoint, use: str, *, floats: bool = False) -> Checkpoint:
    """The checkpoint itself, if it is a model.

    Args:
        use: the command, for the message (`quantize`).
        floats: its weights must not be quantized, GGUF's blocks included.

    Raises:
        RequirementError: it is something else, named with the command that works on it.
    """
    contents = classify(ckpt)
    if contents.kind != "model":
        raise RequirementError(f"{ckpt.label} is {contents.words}; {use} wants a model", hint=contents.hint)
    if floats and contents.quantization is not None:
        raise RequirementError(
            f"{ckpt.label} is already quantized ({contents.quantization}); {use} wants float weights",
            hint=_way_to_floats(ckpt, contents.quantization),
        )
    return ckpt


def _way_to_floats(ckpt: Checkpoint, scheme: Quantization) -> str:
    best = "take the float model that it was made from"
    if not scheme.n_weights:
        return f"{best}; where its weights are floats, remove quantization_config from config.json"
    if scheme.method not in (BLOCKS, *readers_by_method()):
        return best
    command = f"llmkit convert {shlex.quote(str(ckpt.origin or ckpt.label))} --to dense -o FLOATS"
    return f"{best}; where that is lost, `{command}` writes what is left of its weights, rounded as they are"


def _adapter(ckpt: Checkpoint, where: str) -> Classification | None:
    """An adapter, or a model with one beside it; None for neither."""
    config = _beside(ckpt, CONFIG_NAME)
    parts = {*adapter_parts(ckpt.tensors), *with_words(ckpt.tensors, _OTHER_ADAPTERS)}
    is_gguf = ckpt.details.get("metadata", {}).get("general.type") == "adapter"
    files: dict[str, None] = {}
    if config is not None:
        files = dict.fromkeys(read.source.path.name for lazy in ckpt.tensors.values() for read in lazy.reads())
    is_saved = any(file.startswith("adapter") for file in files)
    if not is_gguf and not is_saved and 2 * len(parts) < max(1, len(ckpt.tensors) + (config is not None)):
        if config is None or ckpt.origin is None or not ckpt.origin.is_dir():
            return None
        if not any(name.startswith("adapter_model.") for name in left_unread(ckpt.origin, ckpt.tensors)):
            return None
        words = f"a model and an adapter at once ({' and '.join([*files][:1])} and {CONFIG_NAME})"
        hint = f"move {CONFIG_NAME} and adapter_model.* out of {where}: transformers would load the adapter's base"
        return Classification("several", words, hint)
    config = config or {}
    kind = str(config.get("peft_type") or "LORA").replace("LORA", "LoRA")
    ranks = {s.shape[0] for n, s in ckpt.tensors.items() if "lora_A" in n and len(s.shape) == 2}
    rank = next(iter(ranks)) if len(ranks) == 1 else config.get("r")
    base = config.get("base_model_name_or_path")
    words = f"{'an' if kind[:1] in 'AEIO' else 'a'} {kind} adapter" + (f" of rank {rank}" if rank is not None else "")
    if isinstance(base, str) and base:
        words += f" for {base}"
    else:
        base = "BASE"
    return Classification("adapter", words, f"llmkit lora merge {shlex.quote(base)} {where} -o OUT makes a model of it")


def _beside(ckpt: Checkpoint, name: str) -> dict[str, Any] | None:
    """A JSON file of the checkpoint, or beside the single file that was opened; empty where it cannot be read."""
    try:
        if name in ckpt.files:
            return parse_object(ckpt.files[name].read(), name)
        if ckpt.origin is not None and ckpt.origin.is_file() and (ckpt.origin.parent / name).is_file():
            return read_object(ckpt.origin.parent / name)
    except LlmkitError:
        return {}
    return None
