"""Whether the weights of a checkpoint are quantized, and how, from names, dtypes and shapes of its tensors.

What config.json says of a quantization only adds to that: releases of 2023 say nothing there, or under other keys.
This is the one place that answers. Codecs recognise what they read; the tables here name what none reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.quantization.codec import Specs, config_entry, folder_readers
from llmkit.tensors.spec import DType

BLOCKS = "GGUF blocks"
_BYTES = (DType.I8, DType.U8)
_LAYOUTS = {"gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq"}


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        method: the format's name, as `quant_method` spells it where it has one.
        words: bits and groups in a few words (`int4 group 128`); empty where they cannot be told.
        seen: what tells it, for messages.
        is_stated: config.json says so.
        n_weights: how many matrices are; 0 where config.json says so and the tensors do not.
    """

    method: str
    words: str
    seen: str
    is_stated: bool = False
    n_weights: int = 0

    def __str__(self) -> str:
        return f"{self.words}, {self.method}" if self.words else self.method


def find_quantization(specs: Specs, config: Mapping[str, Any]) -> Quantization | None:
    """The quantization of tensors with these specs; None for floats.

    Args:
        specs: name in the file -> dtype and shape.
        config: the contents of config.json; empty without one.
    """
    entry = config_entry(config)
    stored = _stored(specs, config)
    if entry is None:
        return stored
    implied = {"bitsandbytes": _bnb_bits(entry), "compressed-tensors": "config_groups" in entry}
    untold = stored.method if stored is not None else "unknown method"
    method = str(entry.get("quant_method") or next((name for name, is_so in implied.items() if is_so), untold))
    bits = entry.get("bits") or entry.get("w_bit") or _bnb_bits(entry)
    kind = "float" if "fp" in str(entry.get("data_type")) else "int"  # AutoRound's mx_fp, nv_fp, fp
    words = f"{kind}{bits}" if isinstance(bits, int) and not isinstance(bits, bool) else _group_words(entry)
    if stored is None:
        return Quantization(method, words, "quantization_config in config.json", is_stated=True)
    return Quantization(
        method if _alike(method, stored.method) else f"{stored.method} (config.json says {method})",
        words if "config_groups" in entry else stored.words or words,
        stored.seen, is_stated=True, n_weights=stored.n_weights,
    )  # fmt: skip


def _group_words(entry: Mapping[str, Any]) -> str:
    """The weights of compressed-tensors' config groups."""
    groups, kinds = entry.get("config_groups"), list[str]()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            size, strategy = weights.get("group_size"), weights.get("strategy")
            how = (
                f"group {size}"
                if isinstance(size, int) and size > 0
                else f"per {strategy or ('channel' if size == -1 else 'tensor')}"
            )
            symmetry = "symmetric" if weights.get("symmetric", True) else "asymmetric"
            kinds.append(f"{weights.get('type', 'int')}{weights.get('num_bits', '?')} {how} {symmetry}")
    return ", ".join(dict.fromkeys(kinds))


def _bnb_bits(entry: Mapping[str, Any]) -> int | None:
    return 8 if entry.get("load_in_8bit") else 4 if entry.get("load_in_4bit") else None


def _alike(stated: str, stored: str) -> bool:
    """Whether the method of config.json may be stored in the layout that was found."""
    return stated == stored or not {stated, stored} <= _LAYOUTS


def _stored(specs: Specs, config: Mapping[str, Any]) -> Quantization | None:
    if all(spec.dtype.is_arithmetic for spec in specs.values()):  # whatever the layout, codes are integers or of 8 bits
        return None
    for codec in folder_readers():
        recognised = codec.recognise(specs, config)
        if recognised is not None:
            words, names = recognised
            return Quantization(codec.name, words, _seen(names), n_weights=len(names))
    packed = [name for name in specs if name.endswith(tuple(_BY_LEAF))]
    for leaf, (method, words) in _BY_LEAF.items():
        names = [name for name in packed if name.endswith(leaf)]
        if names:
            return Quantization(method, words, _seen(names), n_weights=len(names))
    return _by_bytes(specs, config)


def _seen(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more like it"


# (method, words) by the last part of the packed tensor's name, the most telling first.
_BY_LEAF: Mapping[str, tuple[str, str]] = {
    ".qweight": ("qweight", ""),
    ".quant_weight": ("gptq", "as lit-llama stores it"),
    ".weight.data": ("bitsandbytes before 0.42, pickled", "4 bits"),
    ".weight_scale_inv": ("fp8", "float8 blocks"),
    ".weight._data": ("quanto", ""),
    ".weight_scales": ("eetq", "int8"),
    ".Qidxs": ("quip", ""),
    ".codebooks": ("aqlm", ""),
    ".q_weight": ("exl2", ""),
    ".trellis": ("exl3", ""),
    ".centroids.weight": ("vptq", ""),
    ".dense_weights": ("spqr", ""),
    ".workspace": ("marlin", "int4"),
    ".weight_codes": ("an ONNX graph's integers", ""),
}  # fmt: skip


def _by_bytes(specs: Specs, config: Mapping[str, Any]) -> Quantization | None:
    """A `weight` of float8, of bytes, or of MLX's words."""
    matrices = [(n, s) for n, s in specs.items() if n.endswith(".weight") and len(s.shape) == 2]
    small = [(n, s) for n, s in matrices if s.dtype.name.startswith("F8")]
    if small:
        seen = f"{small[0][0]} is {small[0][1].dtype.name}"
        return Quantization("float8 without scales", "", seen, n_weights=len(small))
    whole = [(n, s) for n, s in matrices if s.dtype in _BYTES]
    if whole and 2 * len(whole) >= len(matrices):
        return Quantization("an unknown method", "", f"{whole[0][0]} is {whole[0][1].dtype.name}", n_weights=len(whole))
    words = [(n, s) for n, s in matrices if s.dtype is DType.U32]  # signed ones are what a delta of llmkit's counts
    stems = [n.removesuffix("weight") for n, _ in words]
    if words and all({f"{stem}scales", f"{stem}biases"} <= specs.keys() for stem in stems):
        stated = config.get("quantization")
        bits, size = (
            (stated.get(key) for key in ("bits", "group_size")) if isinstance(stated, Mapping) else (None, None)
        )
        told = f"int{bits} group {size}" if isinstance(bits, int) and isinstance(size, int) else ""
        return Quantization("mlx", told, f"{words[0][0]} is U32", n_weights=len(words))
    return None
