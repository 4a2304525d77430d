"""An adapter as one table of tensors, and how PEFT's config and tensors become it.

How it changes the weights of a base is computed by `llmkit.transforms.lora`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, RequirementError, SpecError, listing
from llmkit.formats import adapter_config as rules
from llmkit.formats.adapter_files import CONFIG_NAME, empty_adapter
from llmkit.formats.adapter_names import parse_names
from llmkit.tensors.lazy import Lazy

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_PREFIXES = {"LORA": "lora_", "ADALORA": "lora_", "LOHA": "hada_", "LOKR": "lokr_", "IA3": "ia3_"}
_NEEDED = {
    **{a: (b,) for a, b in _PAIRS}, **{b: (a,) for a, b in _PAIRS},
    "hada_w1_a": ("hada_w1_b", "hada_w2_a", "hada_w2_b"), "lokr_w1_a": ("lokr_w1_b",), "lokr_w2_a": ("lokr_w2_b",),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to which module, by the paths of the model it was trained on.

    Attributes:
        label: a short name for messages.
        kind: the `peft_type`, upper case.
        config: the contents of adapter_config.json.
        modules: module path -> part (`lora_A`, `ia3_l`, …) -> tensor.
        scaling: module path -> factor of its update.
        replacements: parameter path (`lm_head.weight`) -> the tensor that takes the base's place.
        tokens: module path -> token ids and their new rows.
        layout: whose names its modules have: `hf` (the trained model's), or `other` (see `transforms.lora.spelling`).
        folder: where it was read from; its tokenizer files may be needed.
        notes: what was decided and the user should see.
        warnings: what the user should act on.
    """

    label: str
    kind: str
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Lazy]]
    scaling: Mapping[str, float]
    replacements: Mapping[str, Lazy] = field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], Lazy]] = field(default_factory=dict)
    folder: Path | None = None
    layout: str = "hf"
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked: set[tuple[object, ...]] = set()
        for module, parts in self.modules.items():
            if (key := (*parts, *[lazy.shape for lazy in parts.values()])) not in checked:
                _check_parts(self.label, module, parts)
                checked.add(key)

    @property
    def is_transposed(self) -> bool:
        """The adapted weights are stored [in, out] (`fan_in_fan_out`)."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every LoRA-like module, from the shapes."""
        return {m: r for m, parts in self.modules.items() if (r := _rank(parts)) is not None}

    @property
    def base_copies(self) -> tuple[str, ...]:
        """Replacements that PEFT saved only because an update, or trained rows, of the same weight go with them."""
        changed = (*self.modules, *self.tokens)
        return tuple(p for p in self.replacements if p.endswith(".weight") and p.removesuffix(".weight") in changed)

    def __repr__(self) -> str:
        return f"Adapter({self.label!r}, {self.kind}, {len(self.modules)} modules)"


def from_peft(
    label: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    *,
    folder: Path | None = None,
    force: bool = False,
) -> Adapter:
    """An adapter from PEFT's config and tensors by their stored names.

    Raises:
        InputError: no adapter tensors, half a pair, or shapes that do not fit.
        RequirementError: an adapter that no merged weights can express, named.
    """
    config = rules.normal_values(config)
    kind = rules.kind_of(config, label)
    warnings = rules.refuse_unmergeable(config, label, force=force)
    unknown = rules.unknown_keys(config)
    if unknown:
        warnings.append(
            f"{label}: keys of {CONFIG_NAME} that are not known here and are not considered: {listing(unknown)}"
        )
    modules, replacements, deltas = _sorted(label, tensors)
    _refuse_other_kind(label, kind, modules)
    warnings += _incomplete(label, config, modules, deltas, force)
    warnings += _left_out_warnings(label, config, modules)
    pruned = {m: modules.pop(m) for m in [m for m, parts in modules.items() if _is_of_rank_zero(parts)]}
    of_pruned = {id(lazy) for parts in pruned.values() for lazy in parts.values()}
    _refuse_empty(label, {name: lazy for name, lazy in tensors.items() if id(lazy) not in of_pruned})
    if not modules and not deltas and not (kind == "LN_TUNING" and replacements) and not _saves(config, replacements):
        raise empty_adapter(label, tensors)
    ranks = {m: r for m, parts in modules.items() if (r := _rank(parts) or _stated_rank(config, parts, m)) is not None}
    warnings += _rank_warnings(label, config, kind, ranks)
    return Adapter(
        label,
        kind,
        dict(config),
        modules,
        rules.scalings_of(config, kind, ranks),
        replacements,
        {m: (_token_ids(label, config, m, t), t) for m, t in deltas.items()},
        folder,
        notes=(*_base_notes(label, config), *_pruned_notes(label, pruned)),
        warnings=tuple(warnings),
    )


def _refuse_other_kind(label: str, kind: str, modules: Mapping[str, Iterable[str]]) -> None:
    """Refuse tensors of another kind of adapter than the config states: PEFT finds none of its own among them."""
    own = _PREFIXES.get(kind)
    for module, parts in modules.items():
        for part in parts:
            if own is not None and not part.startswith(own) and part.startswith(tuple(_PREFIXES.values())):
                raise InputError(
                    f"{label}: peft_type of its {CONFIG_NAME} is {kind}, and its file holds {part} of {module}",
                    hint="the config is another adapter's: take the one that was saved with the file",
                )


def _incomplete(
    label: str, config: Mapping[str, Any], modules: Mapping[str, Iterable[str]], deltas: object, force: bool
) -> Iterable[str]:
    """What the config says was trained beside the factors, and the file lacks: refused, or with `force` a warning."""
    lengths = "lora_magnitude_vector"
    bare = [m for m, parts in modules.items() if lengths not in parts and any(a in parts for a, _ in _PAIRS)]
    for key, lacking in (("use_dora", bare and f"{lengths} of {bare[0]}"), ("trainable_token_indices", "trained rows")):
        if not config.get(key) or not lacking or (deltas and key != "use_dora"):
            continue
        text = f"{label}: its file has no {lacking}, which {key} of its {CONFIG_NAME} says was trained"
        if not force:
            raise RequirementError(
                text, hint="save it again from the trained model (model.save_pretrained); --force merges what is there"
            )
        yield f"forced: {text}"


def _left_out_warnings(label: str, config: Mapping[str, Any], modules: Iterable[str]) -> Iterable[str]:
    if out := rules.left_out(config, modules):
        yield (
            f"{label}: its {CONFIG_NAME} leaves out {listing(out, 3)}, and its file has an update for "
            f"{'it' if len(out) == 1 else 'them'}, which is merged, and which peft would not load"
        )


def _saves(config: Mapping[str, Any], replacements: Iterable[str]) -> bool:
    """Whether all that is there is what the config says it saved whole."""
    named = rules.saved_modules(config)
    modules = [name.rpartition(".")[0] for name in replacements]
    return bool(modules) and all(rules.is_among(named, module) for module in modules)


def _is_of_rank_zero(parts: Mapping[str, Lazy]) -> bool:
    """Whether AdaLoRA pruned all of a module's update: A is [0, in], B [out, 0]. A shard that is missing is [0]."""
    a, b = (parts[part].shape if part in parts else () for part in _PAIRS[0])
    return len(a) == len(b) == 2 and a[0] == b[1] == 0 < min(a[1], b[0])


def _pruned_notes(label: str, pruned: Mapping[str, object]) -> Iterable[str]:
    if pruned:
        yield f"{label}: the update of {listing(pruned, 3)} has rank 0: nothing is left of it"


def _refuse_empty(label: str, tensors: Mapping[str, Lazy]) -> None:
    """Refuse tensors without elements: ZeRO-3 and FSDP leave them where shards are not gathered before saving."""
    empty = [name for name, lazy in tensors.items() if 0 in lazy.shape]
    if empty:
        raise InputError(
            f"{label}: {len(empty)} of its {len(tensors)} tensors are empty ({listing(empty, 2)}): shards of a "
            "distributed run (ZeRO-3, FSDP) were not gathered before saving, and their values are not in the file",
            hint="save again with stage3_gather_16bit_weights_on_model_save, or gather the run's checkpoint with its "
            "zero_to_fp32.py",
        )


def _sorted(
    label: str, tensors: Mapping[str, Lazy]
) -> tuple[dict[str, dict[str, Lazy]], dict[str, Lazy], dict[str, Lazy]]:
    """Module parts, replacements by parameter path, and rows of trained tokens."""
    modules: dict[str, dict[str, Lazy]] = {}
    replacements: dict[str, Lazy] = {}
    deltas: dict[str, Lazy] = {}
    under: dict[str, Lazy] = {}
    adapters: dict[str, None] = {}
    for name, lazy in zip(parse_names(tensors).values(), tensors.values(), strict=True):
        if name is None or name.part == "ranknum":
            continue
        if name.adapter is not None:
            adapters[name.adapter] = None
        if name.part == "base_weight":
            under[name.module] = lazy
        elif name.part == "trainable_tokens_delta":
            deltas[name.module] = lazy
        elif name.is_replacement:
            replacements[f"{name.module}.{name.part}" if name.module else name.part] = lazy
        elif modules.setdefault(name.module, {}).setdefault(name.part, lazy) is not lazy:
            raise InputError(f"{label}: two tensors are {name.part} of {name.module}")
    if len(adapters) > 1:
        raise InputError(
            f"{label} holds several adapters: {listing(adapters)}", hint="save one of them with save_pretrained"
        )
    # PEFT saves the weight under an adapted layer for embeddings and heads only; a dump of a whole model has them all,
    # where they are frozen copies of the base.
    for module, lazy in under.items():
        if len(under) <= 2 or "lora_embedding_A" in modules.get(module, {}):
            replacements[f"{module}.weight"] = lazy
    return modules, replacements, deltas


def _rank(parts: Mapping[str, Lazy]) -> int | None:
    for part in ("lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in parts:
            return parts[part].shape[0]
    return None


def _stated_rank(config: Mapping[str, Any], parts: Mapping[str, Lazy], module: str) -> int | None:
    """LoKr whose factors are stored whole scales by the rank of the config all the same."""
    return rules.rank_of(config, module) if "lokr_w1" in parts else None


def _check_parts(label: str, module: str, parts: Mapping[str, Lazy]) -> None:
    for part, partners in _NEEDED.items():
        missing = [p for p in partners if part in parts and p not in parts]
        if missing:
            raise InputError(
                f"{label}: {module} has {part} but no {listing(missing)}",
                hint="the file is incomplete: save or download it again",
            )
    for first, second in _PAIRS:
        if first in parts:
            a, b = parts[first].shape, parts[second].shape
            if len(a) != 2 or len(b) != 2:
                raise InputError(
                    f"{label}: {first} and {second} of {module} have shapes {list(a)} and {list(b)}; expected two "
                    "matrices",
                    hint="shards of a distributed run were not gathered before saving (ZeRO-3, FSDP): save it again",
                )
            if a[0] != b[1]:
                raise SpecError(
                    f"{label}: {module}: {first} {list(a)} has rank {a[0]}, {second} {list(b)} has rank {b[1]}"
                )
    if any(p in parts for p in ("hada_t1", "hada_t2", "lokr_t2")):
        raise RequirementError(f"{label}: {module} is a convolution; only matrices are merged")


def _rank_warnings(label: str, config: Mapping[str, Any], kind: str, ranks: Mapping[str, int]) -> list[str]:
    if kind in ("ADALORA", "LOKR") or config.get("target_parameters"):
        return []  # pruned ranks are lists, factors may be stored whole, and A of a stack has the ranks of all experts
    stated = rules.ranks_of(config, ranks)
    wrong = {m: r for m, r in ranks.items() if stated[m] not in (None, r)}
    if not wrong:
        return []
    module, rank = next(iter(wrong.items()))
    return [
        f"{label}: {CONFIG_NAME} gives {module} rank {stated[module]}, its tensors have rank {rank}"
        f"{f' ({len(wrong)} modules)' if len(wrong) > 1 else ''}: the tensors' rank is used, also for the scaling"
    ]


def _token_ids(label: str, config: Mapping[str, Any], module: str, rows: Lazy) -> tuple[int, ...]:
    stated = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(stated, Mapping):
        # PEFT wraps a tied head, too, with the ids of the embedding, which alone is named.
        of_tied = next(iter(stated.values())) if len(stated) == 1 else None
        stated = next((v for k, v in stated.items() if module == k or module.endswith(f".{k}")), of_tied)
    if not isinstance(stated, list) or not all(isinstance(i, int) for i in stated):
        raise InputError(f"{label}: {CONFIG_NAME} does not say which tokens the rows of {module} belong to")
    if len(stated) != rows.shape[0]:
        raise SpecError(f"{label}: {module} has {rows.shape[0]} trained rows for {len(stated)} token ids")
    return tuple(stated)


def _base_notes(label: str, config: Mapping[str, Any]) -> Iterable[str]:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return
    words = ("4bit", "8bit", "bnb", "gptq", "awq", "int4", "int8")
    if any(w in base.lower().replace("-", "") for w in words):
        yield (
            f"{label} was trained on {base}, a quantized base: merged into float weights it sees a slightly different "
            "base than in training"
        )
    else:
        yield f"{label} was trained on {base}"
