"""A slot: one weight of a model, with its canonical id, its name in files and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llmkit.architecture.kinds import SlotKind

__all__ = ["Slot"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One weight of a model.

    Attributes:
        id: canonical, the same for every family (`layers.3.attn.q.weight`).
        name: as checkpoints of this family spell it.
        kind: what sort of weight: embedding, linear, norm, bias or head.
        is_optional: may be absent (a tied head).
        layer: its layer, None outside the layers.
        formula: the shape in the words of config.json.
    """

    id: str
    name: str
    shape: tuple[int, ...]
    kind: SlotKind
    is_optional: bool = False
    layer: int | None = None
    formula: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)
