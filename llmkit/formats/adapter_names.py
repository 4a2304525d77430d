"""Names of adapter tensors as PEFT writes them, and as wrappers around a training run leave them.

A name is `<prefixes><module path>.<part>[.<adapter name>][.weight]`. Prefixes come from PEFT (`base_model.model.`),
FSDP, `torch.compile` and data parallelism; the adapter's name is in the file when it was saved by `torch.save` of a
state dict rather than by PEFT.

Source: huggingface/peft, src/peft/utils/save_and_load.py and the tuners' layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from llmkit.formats.wrappers import unwrapped
from llmkit.tensors.names import cut

_PREFIX = re.compile(r"^(?:module\.)*(?:base_model\.model\.|base_model\.)?(?:module\.)*")
_PARTS = (
    "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_A", "lora_B", "lora_E", "ranknum",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1_a", "lokr_w1_b", "lokr_w1",
    "lokr_w2_a", "lokr_w2_b", "lokr_w2", "lokr_t2", "ia3_l", "trainable_tokens_delta", "lora_velora_embed",
)  # fmt: skip
_PART = re.compile(rf"^(?:(?P<module>.+?)\.)??(?:token_adapter\.)?(?P<part>{'|'.join(_PARTS)})(?:\.(?P<rest>.+))?$")
_SAVED = re.compile(
    r"^(?P<module>.+?)\.(?P<wrapper>modules_to_save|ln_tuning_layers)\.(?:(?P<adapter>[^.]+)\.)?(?P<leaf>[^.]+)$"
)
# Copies of base weights that wrappers keep beside the trained ones.
_BEGINNINGS = tuple(dict.fromkeys(part.split("_")[0] for part in _PARTS))
_IS_PART = frozenset((*_PARTS, "lora_B.bias"))
_FROZEN = re.compile(r"\.original_module\.|\.trainable_tokens_original|\.lora_velora_embed")


class TensorName(NamedTuple):
    """What a name says.

    Attributes:
        module: path of the module, in the names of the model that was trained.
        part: `lora_A`, `lora_B`, `lora_B.bias`, `ia3_l`, … or, for a tensor that replaces the base's, `weight`, `bias`
            or another parameter's name; `base_weight` for the weight under an adapted layer.
        adapter: the adapter's name, where the file has it.
    """

    module: str
    part: str
    adapter: str | None = None

    @property
    def is_replacement(self) -> bool:
        """The tensor takes the place of one of the base."""
        return self.part not in _IS_PART


def parse_name(name: str) -> TensorName | None:
    """The parts of a tensor's name; None for a frozen copy of a base weight, which says nothing."""
    path = _PREFIX.sub("", unwrapped(name), count=1)
    if _FROZEN.search(f".{path}"):
        return None
    match = _PART.match(path)
    if match is not None:
        return _adapter_part(match["module"] or "", match["part"], match["rest"])
    saved = _SAVED.match(path)
    if saved is not None:
        return TensorName(saved["module"], saved["leaf"], saved["adapter"])
    module, _, leaf = path.rpartition(".")
    if module.endswith(".base_layer") or module == "base_layer":
        inner = module.removesuffix("base_layer").removesuffix(".").removesuffix(".token_adapter")
        return TensorName(inner, "base_weight" if leaf == "weight" else leaf)
    return TensorName(module, leaf)


def parse_names(names: Iterable[str]) -> dict[str, TensorName | None]:
    """`parse_name` of many. What thousands begin and end with, before and after their last number, is parsed once."""
    parsed: dict[str, TensorName | None] = {}
    starts: dict[str, str | None] = {}  # what a module's path begins with, by what a name does
    tails: dict[str, TensorName | None] = {}
    for name in names:
        before, number, after = cut(name)
        if before not in starts:
            begin = parse_name(f"{before}0.weight")
            starts[before] = begin.module[:-1] if begin is not None and begin[1:] == ("weight", None) else None
        if after not in tails:
            rest = parse_name(f"0{after}") if after.startswith(".") else None
            tails[after] = None if rest is None or rest.is_replacement else rest._replace(module=rest.module[1:])
        start, end = starts[before], tails[after]
        if start is None or end is None or not number:
            parsed[name] = parse_name(name)
        else:
            parsed[name] = TensorName(start + number + end.module, end.part, end.adapter)
    return parsed


def is_adapter_part(name: str) -> bool:
    """Whether a tensor of this name is part of an adapter's update, rather than a whole parameter."""
    parsed = parse_name(name)
    return parsed is not None and not parsed.is_replacement


def adapter_parts(names: Iterable[str]) -> list[str]:
    """Those names for which `is_adapter_part` holds."""
    return [name for name in with_words(names, _BEGINNINGS) if is_adapter_part(name)]


def with_words(names: Iterable[str], words: Iterable[str]) -> list[str]:
    """Those names that have one of some words in them. Of a model with a hundred thousand, none is looked at."""
    names = list(names)
    text = "\n".join(names)
    there = [word for word in words if word in text]
    return [name for name in names if any(word in name for word in there)] if there else []


def _adapter_part(module: str, part: str, rest: str | None) -> TensorName:
    words = rest.split(".") if rest else []
    is_bias = bool(words) and words[-1] == "bias" and part == "lora_B"
    if words and words[-1] in ("weight", "bias"):
        words.pop()
    return TensorName(module.removesuffix("."), f"{part}.bias" if is_bias else part, ".".join(words) or None)
