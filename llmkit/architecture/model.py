"""An architecture bound to one config: the slots there are, their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from llmkit.architecture.check import Report, compare
from llmkit.architecture.keys import as_bool
from llmkit.architecture.kind import Kind, SlotShape, under
from llmkit.architecture.kinds import Embedding, Head
from llmkit.architecture.names import Fused, Names, NameTable
from llmkit.architecture.sizes import Sizes
from llmkit.architecture.slots import Part, Slot
from llmkit.architecture.unread import Unread
from llmkit.tensors.spec import TensorSpec


@dataclass(frozen=True)
class Model:
    """An architecture with the sizes and values of one config.

    Attributes:
        family: the architecture's name.
        dims: the sizes.
        embedding: the kind that makes hidden states of ids.
        blocks: the kind of each layer, with plain values.
        final_norm: the norm before the head.
        head: the output head, with plain values.
        names: how the tensors are spelled and stored.
        unread: what no kind read of the config.
    """

    family: str
    dims: Sizes
    embedding: Embedding
    blocks: tuple[Kind, ...]
    final_norm: Kind
    head: Head
    names: Names
    unread: Unread = field(default_factory=Unread)

    @property
    def is_tied(self) -> bool:
        """True when the head shares the embedding's weight."""
        return as_bool(self.head.tied)

    @property
    def block(self) -> Kind:
        """The first layer's kind."""
        return self.blocks[0]

    @cached_property
    def table(self) -> NameTable:
        """The name table."""
        return NameTable(self.names)

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Slot id -> slot, one for each tensor, in the order of the computation."""
        outer = self.embedding.slots()
        slots = [self._outer(slot, shape) for slot, shape in outer.items()]
        for i, block in enumerate(self.blocks):
            slots += self._layer(i, block)
        outer = under("final_norm", self.final_norm) | self.head.slots()
        slots += [self._outer(slot, shape) for slot, shape in outer.items()]
        return MappingProxyType({slot.id: slot for slot in slots})

    @cached_property
    def stored_in(self) -> Mapping[str, str]:
        """Id of a weight of a kind (`layers.3.attn.q.weight`) -> id of the slot that holds it."""
        return MappingProxyType({part.id: slot.id for slot in self.slots.values() for part in slot.parts})

    def _outer(self, slot: str, shape: SlotShape) -> Slot:
        return self._slot(slot, [(slot, shape)], None, None, False)

    def _layer(self, i: int, block: Kind) -> list[Slot]:
        gathered: dict[str, list[tuple[str, SlotShape]]] = {}
        stored: dict[str, tuple[Fused | None, bool]] = {}
        for leaf, shape in block.slots().items():
            slot, fused, is_transposed = self.table.stored_in(leaf)
            gathered.setdefault(slot, []).append((f"layers.{i}.{leaf}", shape))
            stored[slot] = fused, is_transposed
        return [self._slot(f"layers.{i}.{slot}", parts, i, *stored[slot]) for slot, parts in gathered.items()]

    def _slot(
        self,
        slot: str,
        shapes: list[tuple[str, SlotShape]],
        layer: int | None,
        fused: Fused | None,
        is_transposed: bool,
    ) -> Slot:
        first = shapes[0][1]
        groups = self.dims.kv_heads if fused is not None and fused.rows == "per_group" else 1
        parts = []
        for part, formulas in shapes:
            shape = tuple(self.dims.evaluate(formula) for formula in formulas.dims)
            parts.append(Part(part, shape, (shape[0] if shape else 1) // groups))
        fused_shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:]) if parts[0].shape else ()
        rows = " + ".join(self.dims.spell(formulas.dims[0]) for _, formulas in shapes) if first.dims else ""
        words = [rows, *(self.dims.spell(formula) for formula in first.dims[1:])]
        return Slot(
            id=slot,
            name=self.table.name(slot),
            shape=fused_shape[::-1] if is_transposed else fused_shape,
            kind=first.kind,
            is_optional=first.is_optional,
            layer=layer,
            formula=", ".join(words[::-1] if is_transposed else words),
            parts=tuple(parts),
            groups=groups,
            is_transposed=is_transposed,
        )

    def tensors(self) -> dict[str, Slot]:
        """Tensor name -> slot: every tensor that a checkpoint of this model has, or (optional ones) may have."""
        return {slot.name: slot for slot in self.slots.values()}

    def name_of(self, slot: str) -> str:
        """The tensor name of a slot id; of a weight inside a slot, the name of the tensor that holds it."""
        return self.table.name(self.stored_in.get(slot, slot))

    def spelled(self, names: Names) -> Model:
        """The same model in another spelling: other names, other fusions."""
        return replace(self, names=names)

    @property
    def n_parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(slot.numel for slot in self.slots.values() if not slot.is_optional)

    def check(self, specs: Mapping[str, TensorSpec]) -> Report:
        """Compare the tensors of a checkpoint (as floats, quantized ones by their logical shape) with this model."""
        return compare(self.tensors(), specs, self.table, is_tied=self.is_tied)
