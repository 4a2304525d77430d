"""What the headers of a checkpoint say without any name table: layers, what is in one, what is outside, and buffers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmkit.errors import InputError
from llmkit.tensors.spec import DType, TensorSpec

__all__ = ["Headers", "Tensors", "read_headers"]

Shape = tuple[int, ...]
# Stem -> leaf ("weight", "bias", "" for a bare parameter) -> shape.
Tensors = dict[str, dict[str, Shape]]

_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids|attention\.mask|attn\.mask)$")


@dataclass(frozen=True)
class Headers:
    """The tensors of a checkpoint by where they are.

    Attributes:
        block: the prefix of a layer, with `{i}`.
        n_layers: how many there are.
        inner: tensors of a layer, by stem after the prefix; where layers differ, the commonest shape.
        outer: all others, by stem; those that only layer 0 has among them (some families file what comes before the
            layers there).
        ignored: patterns of buffers.
    """

    block: str
    n_layers: int
    inner: Tensors
    outer: Tensors
    ignored: tuple[str, ...]


def read_headers(specs: Mapping[str, TensorSpec], label: str) -> Headers:
    """Sort the tensors of a checkpoint.

    Raises:
        InputError: no names with layer numbers.
    """
    counts = Counter(found[1] or "" for name in specs if (found := _NUMBERED.fullmatch(name)) is not None)
    if not counts:
        raise InputError(f"{label}: no tensor has a layer's number in its name; a plugin cannot be drafted from that")
    stem = counts.most_common(1)[0][0]
    before = f"{stem}." if stem else ""
    pattern = re.compile(re.escape(before) + r"(\d+)\.(.+)")
    layers: dict[str, dict[int, Shape]] = {}
    outer: dict[str, Shape] = {}
    ignored: dict[str, None] = {}
    for name, spec in specs.items():
        match = pattern.fullmatch(name)
        leaf = match[2] if match else name
        if _is_buffer(leaf, spec):
            ignored[f"*.{leaf}" if match else name] = None
        elif match:
            layers.setdefault(leaf, {})[int(match[1])] = spec.shape
        else:
            outer[name] = spec.shape
    n_layers = 1 + max((i for shapes in layers.values() for i in shapes), default=0)
    inner: dict[str, Shape] = {}
    for leaf, shapes in layers.items():
        if list(shapes) == [0] and n_layers > 1:
            outer[f"{before}0.{leaf}"] = shapes[0]
        else:
            inner[leaf] = Counter(shapes.values()).most_common(1)[0][0]
    return Headers(f"{before}{{i}}.", n_layers, _by_stem(inner), _by_stem(outer), tuple(ignored))


def _is_buffer(leaf: str, spec: TensorSpec) -> bool:
    """Tables and masks that old files store: known names, boolean tensors, and a `bias` that is a causal mask."""
    is_mask = leaf.rpartition(".")[2] == "bias" and len(spec.shape) == 4
    return bool(_BUFFERS.search(leaf)) or spec.dtype is DType.BOOL or is_mask


def _by_stem(shapes: Mapping[str, Shape]) -> Tensors:
    found: Tensors = {}
    for name, shape in shapes.items():
        stem, _, last = name.rpartition(".")
        if last not in ("weight", "bias") or not stem:
            stem, last = name, ""
        found.setdefault(stem, {})[last] = shape
    return found
