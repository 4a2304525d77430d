"""adapter_config.json: what it says of scaling, and the adapters that no merge can reproduce, by name.

Source: huggingface/peft, src/peft/config.py and src/peft/tuners/*/config.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmkit.errors import InputError, RequirementError

# peft_type -> what it is called in messages.
MERGEABLE = {
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr",
    "LN_TUNING": "LN tuning", "TRAINABLE_TOKENS": "trainable tokens",
}  # fmt: skip
MERGE_WITH_PEFT = "merge it with peft (merge_and_unload), then use the merged folder"
_RUN_WITH_PEFT = "run it with peft; no merged model can compute the same"
_ADALORA_EPSILON = 1e-5
_NUMBERS = ("r", "lora_alpha", "alpha", "init_r", "target_r", "qalora_group_size")
_SWITCHES = ("use_", "fan_in", "lora_bias", "ensure_weight", "decompose_both", "enable_lora", "merge_weights")
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
            hint=_RUN_WITH_PEFT,
        )
    if kind in _PROMPTS:
        raise RequirementError(
            f"{label}: {kind.lower().replace('_', ' ')} adds virtual tokens, not weights; there is nothing to merge",
            hint="run it with peft",
        )
    kinds = ", ".join(MERGEABLE.values())
    raise RequirementError(
        f"{label}: adapters of type {kind} are not merged by llmkit; it merges {kinds}",
        hint=MERGE_WITH_PEFT,
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
                hint=_RUN_WITH_PEFT,
            )
    method = str(config.get("init_lora_weights", "")).lower()
    if method.startswith(_MUTATING):
        text = (
            f"{label} was initialised with {config['init_lora_weights']}, which changes the base before training: it "
            "is right only on that changed base"
        )
        if not force:
            raise RequirementError(
                text,
                hint="save it converted (peft: save_pretrained(path_initial_model_for_weight_conversion=…)), or give "
                "the changed base as BASE and add --force",
            )
        return [f"forced: {text}"]
    return []


def normal_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with numbers and truth values that were written as text ("8", "true") as what they mean."""

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, str) and key in _NUMBERS:
            converted = number(value)
            return value if converted is None else int(converted) if converted == int(converted) else converted
        if isinstance(value, str) and value.lower() in ("true", "false") and key.startswith(_SWITCHES):
            return value.lower() == "true"
        if isinstance(value, Mapping) and key in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
            return {k: plain("r" if key != "trainable_token_indices" else key, v) for k, v in value.items()}
        if isinstance(value, list) and key in ("trainable_token_indices", "token_indices"):
            return [plain("r", v) for v in value]
        return value

    return {key: plain(key, value) for key, value in config.items()}


def rounds_update(config: Mapping[str, Any]) -> bool:
    """Whether PEFT casts the update of a linear layer to the dtype of the base before it adds it."""
    return str(config.get("init_lora_weights", "")).lower() == "mica"


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The names in `modules_to_save`; none where it is no list."""
    stated = config.get("modules_to_save")
    return [str(name) for name in stated] if isinstance(stated, list) else []


def left_out(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Modules to which PEFT would apply no update, as the config leaves them out where it names others of them.

    None where it names none of them: then these are names of another model class.
    """
    targets = config.get("target_modules")
    if not targets or targets == "all-linear" or config.get("target_parameters") or config.get("ensure_weight_tying"):
        return []
    try:
        found = {module: _is_target(config, targets, module) for module in modules}
    except re.error:
        return []
    return [module for module, is_target in found.items() if not is_target] if any(found.values()) else []


def _is_target(config: Mapping[str, Any], targets: Any, module: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    if is_among(config.get("exclude_modules"), module) or not is_among(targets, module):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str) or module in targets:
        return True
    patterns = config.get("layers_pattern") or "[^.]*"
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if index := re.match(rf".*\.{pattern}\.(\d+)\.", module):
            return int(index[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def is_among(named: Any, module: str) -> bool:
    """Whether a config's list of modules names one, whole or by its end; a text is a pattern of whole names."""
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return isinstance(named, list | Mapping) and any(module == n or module.endswith(f".{n}") for n in named)


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys that no version of PEFT known here writes: their meaning is not considered."""
    return [key for key in config if key not in _KNOWN_KEYS]


def matched(pattern: Any, module: str) -> Any:
    """The value of the first key of a rank or alpha pattern that fits a module path; None when none does."""
    if not pattern:
        return None
    if not isinstance(pattern, Mapping):
        raise InputError(
            f"adapter_config.json: rank_pattern or alpha_pattern is {pattern!r}; expected an object: module -> number"
        )
    for key, value in pattern.items():
        try:
            is_match = re.match(rf"(.*\.)?({key})$", module) is not None
        except re.error as error:
            raise InputError(f"adapter_config.json: pattern {key!r} is no regular expression: {error}") from error
        if is_match:
            return value
    return None


def number(value: Any) -> float | None:
    """A finite number, also one written as text ("8"); None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value


def rank_of(config: Mapping[str, Any], module: str) -> int | None:
    """The rank that the config gives a module."""
    value = number(matched(config.get("rank_pattern"), module)) or number(config.get("r"))
    return int(value) if value is not None and value == int(value) else None


def ranks_of(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, int | None]:
    """`rank_of` for each of many modules, which a pattern alone tells apart."""
    if config.get("rank_pattern"):
        return {module: rank_of(config, module) for module in modules}
    return dict.fromkeys(modules, rank_of(config, ""))


def scalings_of(config: Mapping[str, Any], kind: str, ranks: Mapping[str, int]) -> dict[str, float]:
    """`scaling_of` for each of many modules by their ranks; without a pattern it follows from the rank alone."""
    if config.get("alpha_pattern"):
        return {module: scaling_of(config, kind, module, rank) for module, rank in ranks.items()}
    scalings = {rank: scaling_of(config, kind, "", rank) for rank in dict.fromkeys(ranks.values())}
    return {module: scalings[rank] for module, rank in ranks.items()}


def scaling_of(config: Mapping[str, Any], kind: str, module: str, rank: int) -> float:
    """The factor of a module's update; `rank` is the one that the tensors have.

    LoRA: alpha/r, with rsLoRA alpha/sqrt(r). AdaLoRA: alpha (see `divisor_of`). LoHa and LoKr: alpha/r.

    Raises:
        InputError: alpha is missing or no number.
    """
    key = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
    stated = matched(config.get("alpha_pattern"), module)
    if stated is None:
        stated = config.get(key, 8 if key == "alpha" else None)
    alpha = number(stated)
    if alpha is None:
        raise InputError(
            f"adapter_config.json: {key} is {stated!r}; expected a number",
            hint="correct it there: the training script has the value",
        )
    if rank < 1:  # of a LoKr whose factors are stored whole, as the config states it
        raise InputError(
            f"adapter_config.json: r is {rank}; expected a positive whole number",
            hint="correct it there: the training script has the value",
        )
    if kind == "ADALORA":
        return alpha if alpha > 0 else _initial_rank(config, rank)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def divisor_of(config: Mapping[str, Any], kind: str, rank: int) -> float:
    """What an update is divided by after it was scaled: for AdaLoRA r0 + 1e-5, otherwise 1.

    r0 is the rank before pruning, as the trained model computed it.
    """
    return _initial_rank(config, rank) + _ADALORA_EPSILON if kind == "ADALORA" else 1.0


def _initial_rank(config: Mapping[str, Any], rank: int) -> float:
    initial = number(config.get("init_r"))
    return rank if initial is None else initial
