"""A slot: one tensor of a model, with its canonical id, its name in files and its shape."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from llmkit.architecture.kind import SlotKind


def is_of_expert(id: str) -> bool:
    """Whether the weight of an id belongs to one of the experts that a router chooses from."""
    return ".experts." in id


class Part(NamedTuple):
    """A weight of a kind, and its place in the slot that stores it.

    Attributes:
        id: canonical, the same for every family (`layers.3.attn.q.weight`).
        shape: as the kinds have it, [out, in].
        rows: its rows in one group of the slot.
    """

    id: str
    shape: tuple[int, ...]
    rows: int


class Slot(NamedTuple):
    """One tensor of a model.

    Attributes:
        id: canonical (`layers.3.attn.q.weight`, or `layers.3.attn.qkv.weight` where it holds several weights).
        name: as checkpoints of this family spell it.
        shape: as stored.
        kind: what sort of weight: embedding, linear, norm, bias, head or another parameter.
        is_optional: may be absent (a tied head).
        layer: its layer, None outside the layers.
        formula: the shape in the words of config.json.
        parts: the weights it holds, one below the other; a single one for most slots.
        groups: how often the parts' rows alternate (1: each part whole).
        is_transposed: stored as [in, out].
        stack: how many matrices lie one behind the other in it, each with as many of the parts; 0 for no stack.
    """

    id: str
    name: str
    shape: tuple[int, ...]
    kind: SlotKind
    is_optional: bool = False
    layer: int | None = None
    formula: str = ""
    parts: tuple[Part, ...] = ()
    groups: int = 1
    is_transposed: bool = False
    stack: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_of_expert(self) -> bool:
        """Whether it belongs to one of the experts that a router chooses from, or to all of a layer."""
        return is_of_expert(self.id)

    @property
    def upright(self) -> Slot:
        """The same for a weight that is [out, in], however files store it."""
        return self._replace(is_transposed=False)

    def of_stack(self, index: int) -> Slot:
        """One of the stacked matrices."""
        n = len(self.parts) // self.stack
        return self._replace(shape=self.shape[1:], parts=self.parts[index * n : (index + 1) * n], stack=0)
