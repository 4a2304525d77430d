"""Which type each matrix of a GGUF file gets: the presets of llama.cpp (`Q4_K_M`, `IQ4_XS`, …) as data.

A preset has one type for most matrices, and rules for some kinds of them; of the rules that hold, the first counts. A
type whose blocks do not divide a row gives way to one of smaller blocks.

Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp of ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmkit.formats.gguf_types import TYPE_BY_NAME


class Sizes(NamedTuple):
    """What rules ask of a model.

    Attributes:
        n_layers: of the model.
        n_shared: query heads that share a key head.
        is_robust: of a family of `GgufFamily.is_robust`.
        has_statistics: the inputs of its matrices were measured.
    """

    n_layers: int
    n_shared: int = 1
    is_robust: bool = False
    has_statistics: bool = False


Condition = Callable[[int, Sizes], bool]
"""Of the number of a layer, and the model."""


def _always(i: int, of: Sizes) -> bool:
    return True


def _first(count: int) -> Condition:
    return lambda i, of: i < count


def _first_part(n: int) -> Condition:
    return lambda i, of: i < of.n_layers // n


def _some(i: int, of: Sizes) -> bool:
    """The first and the last eighth of the layers, and a third of those between."""
    eighth = of.n_layers // 8
    return i < eighth or i >= 7 * of.n_layers // 8 or (i - eighth) % 3 == 2


def _shared(i: int, of: Sizes) -> bool:
    return of.n_shared >= 4


def _robust(i: int, of: Sizes) -> bool:
    return of.is_robust


def _measured(i: int, of: Sizes) -> bool:
    return of.has_statistics


def _not(condition: Condition) -> Condition:
    return lambda i, of: not condition(i, of)


def _both(one: Condition, other: Condition) -> Condition:
    return lambda i, of: one(i, of) and other(i, of)


# Kinds of matrices with rules, by the ends of their names; one fused matrix counts as the values in it.
_KINDS = {"v": re.compile(r"attn_(v|qkv)\.weight"), "down": re.compile(r"ffn_down(_exps|_shexp)?\.weight"),
          "o": re.compile(r"attn_output\.weight")}  # fmt: skip
_VALUES = re.compile(r"blk\.(\d+)\.attn_(v|qkv|kv_b)\.weight")  # what llama.cpp counts as layers of attention
Rule = tuple[str, str, Condition]


@dataclass(frozen=True)
class Preset:
    """A preset.

    Attributes:
        type: of most matrices.
        file_type: `general.file_type` of such files.
        rules: kind of matrices, type, and of which layers.
        head: type of the output matrix, which may be the embedding's, and then of the inputs of layers, too.
    """

    type: str
    file_type: int
    rules: Sequence[Rule] = ()
    head: str = "Q6_K"


_FOUR_OF_SIXTEEN: Sequence[Rule] = (
    ("v", "Q5_K", _shared),
    ("down", "Q5_K", _both(_first_part(8), _not(_measured))),
)
PRESETS: Mapping[str, Preset] = {
    "F32": Preset("F32", 0, head="F32"),
    "F16": Preset("F16", 1, head="F16"),
    "BF16": Preset("BF16", 32, head="BF16"),
    "Q8_0": Preset("Q8_0", 7, head="Q8_0"),
    "Q6_K": Preset("Q6_K", 18),
    "Q5_K_M": Preset("Q5_K", 17, [("v", "Q6_K", _some), ("down", "Q6_K", _some)]),
    "Q5_K_S": Preset("Q5_K", 16),
    "Q5_1": Preset("Q5_1", 9),
    "Q5_0": Preset("Q5_0", 8, [("down", "Q5_1", _both(_measured, _first_part(8)))]),
    "Q4_K_M": Preset("Q4_K", 15, [
        ("v", "Q6_K", _some),
        ("down", "Q6_K", _both(_robust, _first_part(16))),
        ("down", "Q5_K", _both(_robust, _some)),
        ("down", "Q6_K", _both(_not(_robust), _some)),
    ]),
    "Q4_K_S": Preset("Q4_K", 14, [("v", "Q5_K", _first(4)), ("down", "Q5_K", _both(_not(_robust), _first_part(8)))]),
    "Q4_1": Preset("Q4_1", 3),
    "Q4_0": Preset("Q4_0", 2, [("down", "Q4_1", _both(_measured, _first_part(8)))]),
    "IQ4_NL": Preset("IQ4_NL", 25, _FOUR_OF_SIXTEEN),
    "IQ4_XS": Preset("IQ4_XS", 30, _FOUR_OF_SIXTEEN),
    "Q3_K_L": Preset("Q3_K", 13, [
        ("v", "Q5_K", _always),
        ("down", "Q4_K", _robust),
        ("down", "Q5_K", _always),
        ("o", "Q4_K", _robust),
        ("o", "Q5_K", _always),
    ]),
    "Q3_K_M": Preset("Q3_K", 12, [
        ("v", "Q5_K", _first(2)),
        ("v", "Q4_K", _always),
        ("down", "Q5_K", _first_part(16)),
        ("down", "Q4_K", _not(_robust)),
        ("down", "Q4_K", _some),
        ("o", "Q4_K", _not(_robust)),
    ]),
    "Q3_K_S": Preset("Q3_K", 11),
    "Q2_K": Preset("Q2_K", 10, [
        ("v", "Q4_K", _shared), ("v", "Q3_K", _always), ("down", "Q3_K", _always), ("o", "Q3_K", _not(_robust)),
    ]),
    "Q2_K_S": Preset("Q2_K", 21, [("v", "Q4_K", _shared), ("down", "Q4_K", _first_part(8))]),
}  # fmt: skip
# What takes the place of a type whose blocks do not divide a row; where that does not fit either, F16.
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_NO_FIT = "F16"
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
_INPUTS = "per_layer_token_embd.weight"
_ALWAYS_F32 = (  # or the ends of names
    *("position_embd.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"),
    *("ssm_conv1d.weight", "shortconv.conv.weight", "time_mix_lerp_fused.weight", "time_mix_first.weight"),
    *(f"ssm_conv1d_{part}.weight" for part in "qkv"),
    "indexer.proj.weight",
    *(f"time_mix_{name}{i}.weight" for name in ("w", "a", "v", "g", "decay_w") for i in (1, 2)),
    *("altup_correct_coef.weight", "altup_predict_coef.weight"),
)
_NO_BLOCKS = re.compile(r"altup|laurel|per_layer_model_proj")  # small: they stay floats
# llama.cpp knows its 70B model by this: matrices of values, an eighth of the others in size, are given more bits.
_LAYERS_OF_70B = 80


def types_of(
    preset: Preset, shapes: Mapping[str, Sequence[int]], sizes: Sizes
) -> tuple[dict[str, str], dict[str, str]]:
    """The type of each tensor.

    Args:
        shapes: by name in GGUF files, of all tensors.

    Returns:
        The types by name, and those that would have been where blocks do not divide the rows.
    """
    types: dict[str, str] = {}
    wanted: dict[str, str] = {}
    heads = [HEAD] if HEAD in shapes else [EMBEDDING, _INPUTS]
    values = sorted((int(m[1]), name) for name in shapes if (m := _VALUES.fullmatch(name)))
    places = {name: (i, len(values)) for i, (_, name) in enumerate(values)}
    for name, shape in shapes.items():
        if not is_matrix(name, shape):
            types[name] = "F32"
            continue
        kind = _head_type(preset, shape[-1], sizes) if name in heads else _type(preset, name, sizes, places.get(name))
        types[name] = fitting_type(kind, shape[-1])
        if types[name] != kind:
            wanted[name] = kind
    return types, wanted


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a file has a type of its own; vectors, norms and positions are float32."""
    return len(shape) > 1 and name.endswith(".weight") and not name.endswith(("_norm.weight", *_ALWAYS_F32))


def _head_type(preset: Preset, n: int, sizes: Sizes) -> str:
    is_even = n % TYPE_BY_NAME[preset.type].block == 0
    return "Q8_0" if TYPE_BY_NAME[preset.type].dtype is None and (sizes.is_robust or not is_even) else preset.head


def _type(preset: Preset, name: str, sizes: Sizes, place: tuple[int, int] | None) -> str:
    """Of a matrix, by its layer; of one of values, by its `place` among these and their number."""
    if _NO_BLOCKS.search(name) and TYPE_BY_NAME[preset.type].dtype is None:
        return _NO_FIT
    layer = re.match(r"blk\.(\d+)\.(.+)", name)
    if layer is None:
        return preset.type
    i, stem = int(layer[1]), layer[2]
    kinds = {kind for kind, pattern in _KINDS.items() if pattern.fullmatch(stem)}
    i, of = (i, sizes) if place is None else (place[0], sizes._replace(n_layers=place[1]))
    rules = (type_ for kind, type_, holds in preset.rules if kind in kinds and holds(i, of))
    chosen = next(rules, preset.type)
    if "v" in kinds and sizes.n_layers == _LAYERS_OF_70B and sizes.n_shared > 1 and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def fitting_type(kind: str, n: int) -> str:
    """The type, or the one that takes its place for rows of `n` weights."""
    for candidate in (kind, _SMALLER.get(kind, _NO_FIT)):
        if n % TYPE_BY_NAME[candidate].block == 0:
            return candidate
    return _NO_FIT
