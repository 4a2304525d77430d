"""Adapter files that PEFT did not write: LoRA of lit-llama and litgpt, and the foldable parts of LLaMA-Adapter.

Sources: Lightning-AI/lit-llama lit_llama/lora.py, Lightning-AI/litgpt litgpt/{lora,adapter_v2}.py,
OpenGVLab/LLaMA-Adapter llama/model.py. Their LoRA on a fused q/k/v matrix is written here as one ordinary LoRA whose B
has the blocks in their rows and zeros elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, RequirementError, listing
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_files import CONFIG_NAME, empty_adapter
from llmkit.formats.text_file import read_yaml
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import place_in_zeros

FOLDED = "FOLDED"
_GATED = re.compile(r"(^|\.)((adapter_query|adapter_wte|visual_|clip_proj).*|gating_factor|gate|new_gate)$")
_VECTOR = re.compile(
    r"^(?:llama\.)?(?P<module>layers\.\d+\.(?:attention|feed_forward)\.w[qkvo123])[._](?P<what>bias|scale)$"
)
_PAIR = re.compile(
    r"^(?:llama\.)?(?P<path>layers\.\d+\.(?:attention|feed_forward)\.)lora_(?P<proj>w[qkvo123])_l(?P<n>[12])\.weight$"
)
_NORM = re.compile(
    r"^(?:llama\.)?(?P<name>(?:layers\.\d+\.(?:attention_norm|ffn_norm)|norm)\.weight"
    r"|transformer\.(?:h\.\d+\.(?:rms_[12]|norm_[12])|ln_f)\.(?:weight|scale))$"
)
_LIT_SCALE = re.compile(r"^(?P<module>.+)\.adapter_(?P<what>bias|scale)$")


def read(
    file: Path, tensors: Mapping[str, Lazy], label: str, *, alpha: float | None = None, force: bool = False
) -> Adapter:
    """An adapter from a file that has no adapter_config.json.

    Raises:
        InputError: neither format, or a figure that the file does not hold is missing.
        RequirementError: gated prompts, which no weights can express; with `force` the rest is folded without them.
    """
    if any(name.endswith(".lora_A") for name in tensors):
        return _lit(file, tensors, label, alpha)
    if any(_folded_part(n) is not None or _GATED.search(n) for n in tensors):
        return _folded(file, tensors, label, force=force)
    if any("lora_A" in name for name in tensors):
        raise InputError(
            f"{file} holds LoRA tensors, but there is no {CONFIG_NAME} beside it: their scaling is not known",
            hint=f"copy {CONFIG_NAME} from the training run, with r, lora_alpha and target_modules",
        )
    refusal = empty_adapter(str(file), tensors)
    raise InputError(f"{refusal.message}, and has no {CONFIG_NAME} beside it", hint=refusal.hint)


def _lit(file: Path, tensors: Mapping[str, Lazy], label: str, alpha: float | None) -> Adapter:
    settings = _yaml(file.parent / "hyperparameters.yaml")
    alpha = float(settings["lora_alpha"]) if alpha is None and "lora_alpha" in settings else alpha
    if alpha is None:
        raise InputError(
            f"{file}: a LoRA file without its alpha: the scaling of the update is not known",
            hint="give it with --alpha (finetune/lora.py of lit-llama trains with rank 8 and alpha 16)",
        )
    modules: dict[str, dict[str, Lazy]] = {}
    scaling: dict[str, float] = {}
    notes: dict[str, None] = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A"):
            continue
        module = name.removesuffix(".lora_A").removesuffix(".linear")
        modules[module] = {"lora_A": a}
        b = tensors.get(name.removesuffix("A") + "B")
        if b is None:
            continue  # which `Adapter` refuses
        rank = b.shape[1]
        rows, note = _rows_of(file, module, a.shape[0] // rank, b.shape[0], settings)
        if note:
            notes.setdefault(note)
        if rows is not None:
            blocks, n_rows = rows
            b = place_in_zeros(b, (n_rows, rank * len(blocks)), [(block, j * rank) for j, block in enumerate(blocks)])
        modules[module]["lora_B"] = b
        scaling[module] = alpha / rank
    biases = {n: t for n, t in tensors.items() if n.endswith(".bias")}
    config = {"peft_type": "LORA", "lora_alpha": alpha, "bias": "all" if biases else "none"}
    return Adapter(
        label, "LORA", config, modules, scaling, biases, folder=file.parent, layout="other", notes=tuple(notes)
    )


Blocks = tuple[list[Sequence[int]], int]


def _rows_of(
    file: Path, module: str, n_blocks: int, n_rows: int, settings: Mapping[str, Any]
) -> tuple[Blocks | None, str | None]:
    """Rows of the fused matrix that each block of B belongs to, and how many rows that has; None for a plain layer."""
    last = module.rpartition(".")[2]
    if last == "c_attn":
        if n_blocks not in (1, 2, 3):
            raise InputError(f"{file}: {module}: {n_blocks} blocks of rank in a matrix of three")
        size = n_rows // n_blocks
        parts = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}[n_blocks]
        note = f"fused q, k, v: LoRA on {', '.join('qkv'[p] for p in parts)} (as lit-llama trains it)"
        return ([range(p * size, (p + 1) * size) for p in parts], 3 * size), note
    if not (last in ("qkv", "attn") and module.rpartition(".")[0].endswith("attn")):
        return None, None
    model = _yaml(file.parent / "model_config.yaml")
    try:
        heads, size = int(model["n_head"]), int(model.get("head_size") or int(model["n_embd"]) // int(model["n_head"]))
        groups = int(model.get("n_query_groups") or heads)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: {module} fuses q, k and v, and no model_config.yaml beside the file says how",
            hint="copy model_config.yaml of the litgpt checkpoint into the adapter's folder",
        ) from error
    enabled = [bool(settings.get(f"lora_{part}", part != "key")) for part in ("query", "key", "value")]
    if sum(enabled) != n_blocks:
        raise InputError(
            f"{file}: {module} has {n_blocks} blocks of rank; hyperparameters.yaml enables {sum(enabled)} of q, k, v"
        )
    sizes = [heads * size, groups * size, groups * size]
    total = sum(sizes)
    # `attn.attn` is the older name, for rows interleaved by query group. With all three enabled that version left its
    # update in q, k, v order, and so it was trained.
    if last == "attn" and not all(enabled):
        per_group = heads // groups + 2
        place = [(i // size) % per_group for i in range(total)]
        kinds = [[i for i, p in enumerate(place) if p < per_group - 2]]
        kinds += [[i for i, p in enumerate(place) if p == per_group - 2 + j] for j in range(2)]
        note = "fused q, k, v interleaved by query group (older litgpt)"
        return ([rows for rows, on in zip(kinds, enabled, strict=True) if on], total), note
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    ranges = [range(s, s + n) for s, n, on in zip(starts, sizes, enabled, strict=True) if on]
    return (list(ranges), total), "fused q, k, v one after the other (litgpt)"


def _folded(file: Path, tensors: Mapping[str, Lazy], label: str, *, force: bool) -> Adapter:
    gated = [n for n in tensors if _GATED.search(n)]
    text = (
        f"{label} has gated prompts ({listing(gated, 3)}): every layer attends to a learned prompt with a softmax and "
        "a gate of its own, which no weights of the base can express"
    )
    modules: dict[str, dict[str, Lazy]] = {}
    replacements: dict[str, Lazy] = {}
    strange = []
    for name, lazy in tensors.items():
        if (part := _folded_part(name)) is not None:
            module, kind = part
            modules.setdefault(module, {})[kind] = lazy
        elif (match := _NORM.match(name)) is not None:
            replacements[match["name"]] = lazy
        elif name not in gated:
            strange.append(name)
    if gated and not (force and modules):
        hint = "run it with its own code" + ("; --force folds its other parts without them" if modules else "")
        raise RequirementError(text, hint=hint)
    if strange:
        raise InputError(f"{label}: tensors that are not known in a LLaMA-Adapter file: {listing(strange)}")
    warnings = [f"forced: {text}; they are left out"] if gated else []
    scaling = {m: 1.0 for m, parts in modules.items() if "lora_A" in parts}
    return Adapter(
        label, FOLDED, {}, modules, scaling, replacements, folder=file.parent, layout="other", warnings=tuple(warnings)
    )  # fmt: skip


def _folded_part(name: str) -> tuple[str, str] | None:
    """The module of a LLaMA-Adapter's vector or factor, and what it is of it; None for other tensors."""
    if (match := _VECTOR.match(name)) is not None:
        return match["module"], "scale_in" if match["what"] == "scale" else "new_bias"
    if (match := _PAIR.match(name)) is not None:
        return match["path"] + match["proj"], "lora_A" if match["n"] == "1" else "lora_B"
    if (match := _LIT_SCALE.match(name)) is not None:
        return match["module"].removesuffix(".linear"), "scale_out" if match["what"] == "scale" else "inner_bias"
    return None


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = read_yaml(path)
    return data if isinstance(data, dict) else {}
