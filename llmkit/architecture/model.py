"""An architecture bound to one config: the slots there are, their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from llmkit.architecture.check import Report, compare
from llmkit.architecture.keys import as_bool
from llmkit.architecture.kinds import Block, Head, SlotShape
from llmkit.architecture.names import Names, NameTable
from llmkit.architecture.sizes import Sizes
from llmkit.architecture.slots import Slot
from llmkit.tensors.spec import TensorSpec

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """An architecture with the sizes and values of one config.

    Attributes:
        family: the architecture's name.
        dims: the sizes.
        block: the kind of every layer, with plain values.
        head: the output head, with plain values.
    """

    family: str
    dims: Sizes
    block: Block
    head: Head
    names: Names

    @property
    def is_tied(self) -> bool:
        """True when the head shares the embedding's weight."""
        return as_bool(self.head.tied)

    @cached_property
    def table(self) -> NameTable:
        """The name table."""
        return NameTable(self.names)

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Slot id -> slot, in the order of the computation."""
        shapes: dict[str, SlotShape] = {"embed.weight": SlotShape(("vocab", "hidden"), "embedding")}
        inner = self.block.slots()
        for i in range(self.dims.layers):
            shapes.update({f"layers.{i}.{leaf}": shape for leaf, shape in inner.items()})
        shapes.update({f"final_norm.{leaf}": shape for leaf, shape in self.block.norm.slots().items()})
        shapes.update({f"head.{leaf}": shape for leaf, shape in self.head.slots().items()})
        return MappingProxyType({slot: self._slot(slot, shape) for slot, shape in shapes.items()})

    def _slot(self, slot: str, shape: SlotShape) -> Slot:
        return Slot(
            id=slot,
            name=self.table.name(slot),
            shape=tuple(self.dims.evaluate(formula) for formula in shape.dims),
            kind=shape.kind,
            is_optional=shape.is_optional,
            layer=int(slot.split(".")[1]) if slot.startswith("layers.") else None,
            formula=", ".join(self.dims.spell(formula) for formula in shape.dims),
        )

    def tensors(self) -> dict[str, Slot]:
        """Tensor name -> slot: every tensor that a checkpoint of this model has, or (optional ones) may have."""
        return {slot.name: slot for slot in self.slots.values()}

    def name_of(self, slot: str) -> str:
        """The tensor name of a slot id."""
        return self.table.name(slot)

    def slot_of(self, name: str) -> str | None:
        """The slot id of a tensor name; None when this model has no such tensor."""
        slot = self.table.slot(name)
        return slot if slot in self.slots else None

    @property
    def n_parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(slot.numel for slot in self.slots.values() if not slot.is_optional)

    def check(self, specs: Mapping[str, TensorSpec]) -> Report:
        """Compare the tensors of a checkpoint (as floats, quantized ones by their logical shape) with this model."""
        return compare(self.tensors(), specs, self.table, is_tied=self.is_tied)
