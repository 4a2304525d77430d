"""What the headers of a checkpoint say without any name table: layers, what is in one, what is outside, and buffers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.errors import InputError, listing
from llmkit.tensors.spec import DType, TensorSpec

__all__ = ["Headers", "read_headers"]

# Stem -> leaf ("weight", "bias", "" for a bare parameter) -> shape.
Tensors = dict[str, dict[str, tuple[int, ...]]]

_NUMBERED = re.compile(r"((?:.*?\.)?)(\d+)\.(.+)")
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids|attention\.mask|attn\.mask)$")


@dataclass(frozen=True)
class Headers:
    """The tensors of a checkpoint by where they are.

    Attributes:
        block: the prefix of a layer, with `{i}`.
        n_layers: how many there are.
        inner: tensors of a layer, by stem after the prefix, with their shapes in the last layer that has them.
        outer: all others, by stem.
        ignored: patterns of buffers.
    """

    block: str
    n_layers: int
    inner: Tensors = field(default_factory=dict)
    outer: Tensors = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def weight(self, stem: str) -> tuple[int, ...]:
        """The shape of a stem's weight, in a layer or outside; () where there is none."""
        return (self.inner.get(stem) or self.outer.get(stem, {})).get("weight", ())


def read_headers(specs: Mapping[str, TensorSpec], label: str) -> Headers:
    """Sort the tensors of a checkpoint.

    Raises:
        InputError: no names with layer numbers, or no matrix outside the layers.
    """
    numbered = [found for name in specs if (found := _NUMBERED.fullmatch(name)) is not None]
    if not numbered:
        raise InputError(f"{label}: no tensor has a layer's number in its name; a plugin cannot be drafted from that")
    before = Counter(found[1] for found in numbered).most_common(1)[0][0]
    inner: Tensors = {}
    outer: Tensors = {}
    ignored: dict[str, None] = {}
    for name, spec in specs.items():
        match = re.fullmatch(re.escape(before) + r"\d+\.(.+)", name)
        leaf = match[1] if match else name
        # Tables and masks that old files store: known names, boolean tensors, and a `bias` that is a causal mask.
        is_mask = leaf.rpartition(".")[2] == "bias" and len(spec.shape) == 4
        if _BUFFERS.search(leaf) or spec.dtype is DType.BOOL or is_mask:
            ignored[f"*.{leaf}" if match else name] = None
            continue
        stem, _, last = leaf.rpartition(".")
        stem, last = (stem, last) if stem and last in ("weight", "bias") else (leaf, "")
        (inner if match else outer).setdefault(stem, {})[last] = spec.shape
    if not any(len(leaves.get("weight", ())) == 2 for leaves in outer.values()):
        raise InputError(
            f"{label}: no embedding among the tensors outside the layers ({listing(outer) or 'none'}): "
            "a plugin cannot be drafted from that"
        )
    n_layers = 1 + max(int(found[2]) for found in numbered if found[1] == before)
    return Headers(f"{before}{{i}}.", n_layers, inner, outer, tuple(ignored))
