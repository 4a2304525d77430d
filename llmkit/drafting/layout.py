"""What the names of a checkpoint say: the blocks, the tensors in one, those outside, and buffers that nothing needs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.errors import InputError
from llmkit.tensors.spec import DType, TensorSpec

__all__ = ["Layout", "Tensors", "read_layout"]

Shape = tuple[int, ...]
# Stem -> leaf ("weight", "bias", "" for a bare parameter) -> shape.
Tensors = dict[str, dict[str, Shape]]

_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids|attention\.mask|attn\.mask)$")


@dataclass
class Layout:
    """The tensors of a checkpoint, sorted by where they are.

    Attributes:
        block: the prefix of a layer, with `{i}`.
        n_layers: how many there are.
        inner: tensors of a layer, by stem after the prefix.
        outer: all others, by stem.
        first_only: tensors that only layer 0 has (filed there by some families, computed before it).
        ignored: patterns of buffers.
        irregular: what is not the same in all layers, in words.
    """

    block: str
    n_layers: int
    inner: Tensors = field(default_factory=dict)
    outer: Tensors = field(default_factory=dict)
    first_only: Tensors = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    irregular: list[str] = field(default_factory=list)


def read_layout(specs: Mapping[str, TensorSpec], label: str) -> Layout:
    """Sort the tensors of a checkpoint.

    Raises:
        InputError: no names with layer numbers.
    """
    counts: Counter[str] = Counter()
    for name in specs:
        found = _NUMBERED.fullmatch(name)
        if found is not None:
            counts[found[1] or ""] += 1
    if not counts:
        raise InputError(f"{label}: no tensor has a layer's number in its name; a plugin cannot be drafted from that")
    stem = counts.most_common(1)[0][0]
    before = f"{stem}." if stem else ""
    pattern = re.compile(re.escape(before) + r"(\d+)\.(.+)")
    layers: dict[str, dict[int, Shape]] = {}
    found_outer: dict[str, Shape] = {}
    layout = Layout(before + "{i}.", 0)
    for name, spec in specs.items():
        match = pattern.fullmatch(name)
        leaf = match[2] if match else name
        if _is_buffer(leaf, spec):
            pattern_text = f"*.{leaf}" if match else name
            if pattern_text not in layout.ignored:
                layout.ignored.append(pattern_text)
        elif match:
            layers.setdefault(leaf, {})[int(match[1])] = spec.shape
        else:
            found_outer[name] = spec.shape
    layout.n_layers = 1 + max(i for shapes in layers.values() for i in shapes)
    layout.outer = _by_stem(found_outer)
    regular: dict[str, Shape] = {}
    first: dict[str, Shape] = {}
    for leaf, shapes in layers.items():
        if list(shapes) == [0] and layout.n_layers > 1:
            first[leaf] = shapes[0]
            continue
        shape, n = Counter(shapes.values()).most_common(1)[0]
        regular[leaf] = shape
        if len(shapes) < layout.n_layers:
            layout.irregular.append(f"{leaf} is in {len(shapes)} of {layout.n_layers} layers")
        elif n < layout.n_layers:
            layout.irregular.append(f"{leaf} has {list(shape)} in {n} of {layout.n_layers} layers only")
    layout.inner, layout.first_only = _by_stem(regular), _by_stem(first)
    return layout


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
