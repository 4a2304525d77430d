"""An adapter as a checkpoint to be written in PEFT's layout: adapter_model.safetensors, adapter_config.json."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.classification import Classification, classify
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.hub import resolve_path
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.formats.adapter import Adapter, from_peft
from llmkit.formats.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from llmkit.formats.adapter_opening import read_adapter
from llmkit.formats.container import SafetensorsFiles
from llmkit.formats.json_text import parse_object
from llmkit.tensors.lazy import Lazy

_PREFIX = "base_model.model."


def peft_checkpoint(
    label: str,
    modules: Mapping[str, Mapping[str, Lazy]],
    alphas: Mapping[str, float],
    *,
    config: Mapping[str, Any],
    saved: Mapping[str, Lazy],
    files: Mapping[str, FileContent] | None = None,
    step: Mapping[str, Any],
    notes: Sequence[str],
    warnings: Sequence[str] = (),
) -> Checkpoint:
    """A LoRA adapter as a checkpoint to be written.

    Args:
        modules: module path -> `lora_A` and `lora_B`, or their embedding forms.
        alphas: module path -> alpha; the scaling is alpha / rank.
        config: keys of adapter_config.json that do not follow from the tensors.
        saved: parameter path -> whole tensor (modules_to_save; a bias alone, or of an adapted layer, as `bias="all"`).
        files: tokenizer files that belong to the adapter.
    """
    tensors: dict[str, Lazy] = {}
    ranks: dict[str, int] = {}
    for module, parts in modules.items():
        for part, lazy in parts.items():
            is_bare = part.startswith("lora_embedding_")
            tensors[f"{_PREFIX}{module}.{part}{'' if is_bare else '.weight'}"] = lazy
        ranks[module] = next(t.shape[0] for p, t in parts.items() if p.endswith("_A"))
    replaced, with_biases = [], False
    for path, lazy in saved.items():
        module, _, leaf = path.rpartition(".")
        is_bias = leaf == "bias" and (module in modules or f"{module}.weight" not in saved)
        with_biases = with_biases or is_bias
        if module in modules and leaf in ("weight", "bias"):  # PEFT's own place for what is under an adapted layer
            tensors[f"{_PREFIX}{module}.base_layer.{leaf}"] = lazy
            continue
        tensors[_PREFIX + path] = lazy
        replaced += [] if is_bias else [module]
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else rank
    document: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "all" if with_biases else "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        **config,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: _plain(a) for m, a in alphas.items() if a != alpha},
        "modules_to_save": _outermost(replaced) or None,
    }
    document.setdefault("target_modules", list(modules))
    small = dict(files or {})
    small[CONFIG_NAME] = FileContent.of_json(document)
    return Checkpoint(
        label, {}, {}, small, warnings=tuple(warnings), notes=tuple(notes), container=SafetensorsFiles(WEIGHTS_NAME)
    ).derive(tensors=tensors, step=step)  # fmt: skip


def _outermost(modules: Sequence[str]) -> list[str]:
    """Modules that lie in no other of them: PEFT saves one with all that is in it."""
    found = dict.fromkeys(modules)
    return [m for m in found if not any(m.startswith(f"{other}.") for other in found if other)]


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


def open_adapter(adapter: str | Path, *, alpha: float | None = None, force: bool = False) -> Adapter:
    """Open an adapter: a folder, a file, or a hub id. Arguments and errors are those of `read_adapter`.

    Raises:
        RequirementError: a delta, a model or something else that is none.
    """
    path = resolve_path(adapter)
    try:
        return read_adapter(path, alpha=alpha, force=force)
    except InputError as error:
        contents = _other_contents(path)
        if contents is None:
            raise
        name = shlex.quote(str(path))
        made = f"llmkit lora extract BASE {name} --rank 16 -o ADAPTER makes one of it"
        if contents.quantization is not None:
            made = f"llmkit convert {name} --to dense -o FLOATS, then {made.replace(name, 'FLOATS')}"
        hint = contents.hint or made
        raise RequirementError(f"{path.name} is {contents.words}, not an adapter", hint=hint) from error


def _other_contents(path: Path) -> Classification | None:
    """What a path that is no adapter is; None where that is not known either."""
    try:
        ckpt = open_checkpoint(path)
        contents = classify(ckpt)
        is_model = contents.kind == "model" and ckpt.model is not None
    except LlmkitError:
        return None
    return contents if is_model or contents.kind not in ("model", "adapter") else None


def adapter_of(ckpt: Checkpoint) -> Adapter:
    """A checkpoint of `peft_checkpoint` as an adapter again, to be merged or combined before it is written.

    Raises:
        InputError: the checkpoint is no adapter.
    """
    if CONFIG_NAME not in ckpt.files:
        raise InputError(f"{ckpt.label} is no adapter: it has no {CONFIG_NAME}")
    return from_peft(
        ckpt.label, parse_object(ckpt.files[CONFIG_NAME].read(), f"{ckpt.label}/{CONFIG_NAME}"), ckpt.tensors
    )
