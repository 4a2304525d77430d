"""adapter_config.json: what it says of scaling, and the adapters that no merge can reproduce, by name.

Source: huggingface/peft, src/peft/config.py and src/peft/tuners/*/config.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from llmkit.errors import InputError, RequirementError

__all__ = ["MERGEABLE", "kind_of", "matched", "rank_of", "refuse_unmergeable", "scaling_of", "unknown_keys"]

# peft_type -> what it is called in messages.
MERGEABLE = {
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr",
    "LN_TUNING": "LN tuning", "TRAINABLE_TOKENS": "trainable tokens",
}  # fmt: skip
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_KNOWN_KEYS = (
    "alora_invocation_tokens", "alpha", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path",
    "beta1", "beta2", "bias", "corda_config", "decompose_both", "decompose_factor", "deltaT", "enable_lora",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "feedforward_modules",
    "inference_mode", "init_ia3_weights", "init_lora_weights", "init_r", "init_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "module_dropout",
    "modules_to_save", "monteclora_config", "orth_reg_weight", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_dropout", "rank_dropout_scale", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "target_r", "task_type", "tfinal", "tinit", "token_indices", "total_step",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_effective_conv2d", "use_qalora", "use_rslora",
    "velora_config",
)  # fmt: skip
# Initialisations after which the trained base is not the published one: W_res = W - s B0 A0, or a quantized W.
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_UNMERGEABLE = {
    "alora_invocation_tokens": ("aLoRA", "it acts only on tokens after its invocation sequence"),
    "arrow_config": ("arrow routing", "it chooses among adapters for every token"),
    "layer_replication": ("layer replication", "the trained model has more layers than the base"),
    "use_qalora": ("QA-LoRA", "it folds only into the zero points of the group-quantized base it was trained on"),
    "monteclora_config": ("MonteCLoRA", "its update is a distribution, sampled at each step"),
    "kasa_config": ("KaSA", "it was trained on a truncated base and has a diagonal between A and B"),
    "use_bdlora": ("BD-LoRA", "its factors are block-diagonal and not laid out as A and B"),
    "target_parameters": ("LoRA on bare parameters (target_parameters)", "the order of their axes is not in the file"),
}  # fmt: skip


def kind_of(config: Mapping[str, Any], label: str) -> str:
    """The `peft_type`, upper case; LORA where an old file does not say.

    Raises:
        RequirementError: a type whose effect cannot be written into dense weights, or that is not supported.
    """
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind in MERGEABLE:
        return kind
    if kind == "ADAPTION_PROMPT":
        raise RequirementError(
            f"{label}: an adaption prompt (gated prompt attention) cannot be folded into weights: its prompt has a "
            "softmax and a gate of its own in every layer",
            hint="run it with peft; no merged model can compute the same",
        )
    if kind in _PROMPTS:
        raise RequirementError(
            f"{label}: {kind.lower().replace('_', ' ')} adds virtual tokens, not weights; there is nothing to merge",
            hint="run it with peft",
        )
    known = ", ".join(MERGEABLE.values())
    raise RequirementError(
        f"{label}: adapters of type {kind} are not merged by llmkit; it merges {known}",
        hint="merge it with peft (merge_and_unload), then use the merged folder",
    )


def refuse_unmergeable(config: Mapping[str, Any], label: str, *, force: bool) -> list[str]:
    """Refuse options that make a LoRA no dense update of the base; with `force` a changed base is taken on trust.

    Returns:
        Warnings.

    Raises:
        RequirementError: named, with the reason.
    """
    for key, (name, reason) in _UNMERGEABLE.items():
        if config.get(key):
            raise RequirementError(
                f"{label}: {name} cannot be merged into the weights of the base: {reason}",
                hint="run it with peft; no merged model can compute the same" if key != "target_parameters"
                else "merge it with peft (merge_and_unload), then use the merged folder",
            )  # fmt: skip
    method = str(config.get("init_lora_weights", "")).lower()
    if method.startswith(_MUTATING):
        text = (
            f"{label} was initialised with {config['init_lora_weights']}, which changes the base before training: it "
            "is "
            "right only on that changed base"
        )
        if not force:
            raise RequirementError(
                text,
                hint="save it converted (peft: save_pretrained(path_initial_model_for_weight_conversion=…)), or give "
                "the changed base as BASE and add --force",
            )
        return [f"forced: {text}"]
    return []


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys that no version of PEFT known here writes: their meaning is not considered."""
    return [key for key in config if key not in _KNOWN_KEYS]


def matched(pattern: Any, module: str) -> Any:
    """The value of the first key of a rank or alpha pattern that fits a module path; None when none does."""
    if not isinstance(pattern, Mapping):
        return None
    for key, value in pattern.items():
        try:
            is_match = re.match(rf"(.*\.)?({key})$", module) is not None
        except re.error as error:
            raise InputError(f"adapter_config.json: pattern {key!r} is no regular expression: {error}") from error
        if is_match:
            return value
    return None


def rank_of(config: Mapping[str, Any], module: str) -> int | None:
    """The rank that the config gives a module."""
    value = matched(config.get("rank_pattern"), module) or config.get("r")
    return value if isinstance(value, int) else None


def scaling_of(config: Mapping[str, Any], kind: str, module: str, rank: int) -> float:
    """The factor of a module's update; `rank` is the one that the tensors have.

    LoRA: alpha/r, with rsLoRA alpha/sqrt(r). AdaLoRA: alpha/(r0 + 1e-5), where r0 is the rank before pruning, as the
    trained model computed it. LoHa and LoKr: alpha/r.

    Raises:
        InputError: alpha is missing or no number.
    """
    key = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
    alpha = matched(config.get("alpha_pattern"), module)
    if alpha is None:
        alpha = config.get(key, 8 if key == "alpha" else None)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError(
            f"adapter_config.json: {key} is {alpha!r}; expected a number", hint="it is in the training script"
        )
    if kind == "ADALORA":
        initial = config.get("init_r")
        initial = initial if isinstance(initial, int) else rank
        return (alpha if alpha > 0 else float(initial)) / (initial + 1e-5)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
