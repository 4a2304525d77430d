"""An architecture bound to one config: the slots there are, their names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from llmkit.architecture.check import Report, compare
from llmkit.architecture.keys import as_bool
from llmkit.architecture.kind import Kind, SlotShape, under
from llmkit.architecture.kinds import Embedding, Head
from llmkit.architecture.names import Fused, Names, NameTable, Place, Stacked
from llmkit.architecture.sizes import Sizes
from llmkit.architecture.slots import Part, Slot
from llmkit.architecture.unread import Unread
from llmkit.errors import SpecError
from llmkit.tensors.spec import TensorSpec

_MOST_SLOTS = 2_000_000  # sizes are believed before the tensors are looked at


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
        made: list[tuple[Kind, list[Slot]]] = []  # of each sort of layers: most are alike, and some have 1000 tensors
        for i, block in enumerate(self.blocks):
            layer = next((slots for known, slots in made if known == block), None)
            if layer is None:
                layer = self._layer(i, block)
                made.append((block, layer))
            slots += layer if layer[0].layer == i else self._moved(layer, i)
            if len(slots) > _MOST_SLOTS:
                raise SpecError(f"config.json: more than {_MOST_SLOTS:,} tensors follow from it, in {i + 1} layers")
        outer = under("final_norm", self.final_norm) | self.head.slots()
        slots += [self._outer(slot, shape) for slot, shape in outer.items()]
        return MappingProxyType({slot.id: slot for slot in slots})

    @cached_property
    def stored_in(self) -> Mapping[str, str]:
        """Id of a weight of a kind (`layers.3.attn.q.weight`) -> id of the slot that holds it."""
        return MappingProxyType({part.id: slot.id for slot in self.slots.values() for part in slot.parts})

    def _outer(self, slot: str, shape: SlotShape) -> Slot:
        return self._slot(slot, [(slot, shape)], None, Place(slot))

    def _layer(self, i: int, block: Kind) -> list[Slot]:
        gathered: dict[str, list[tuple[str, SlotShape]]] = {}
        places: dict[str, Place] = {}
        for leaf, shape in block.slots().items():
            place = self.table.stored_in(leaf)
            gathered.setdefault(place.leaf, []).append((f"layers.{i}.{leaf}", shape))
            places[place.leaf] = place
        for slot, parts in gathered.items():
            if isinstance(entry := places[slot].entry, Fused):  # in the order of the file, not of the kind
                ordered = {stem: place for place, stem in enumerate(entry.parts)}
                parts.sort(key=lambda part: ordered[part[0].split(".")[-2]])
        return [self._slot(f"layers.{i}.{slot}", parts, i, places[slot]) for slot, parts in gathered.items()]

    def _moved(self, layer: Sequence[Slot], i: int) -> list[Slot]:
        """The slots of a layer for layer `i`, which is alike."""
        old, new = layer[0].layer, f"layers.{i}."
        n, block = len(f"layers.{old}."), self.names.block.format(i=i)
        n_block = len(self.names.block.format(i=old))
        moved = []
        for slot in layer:
            parts = tuple([Part(new + id[n:], shape, rows) for id, shape, rows in slot.parts])
            moved.append(Slot(
                new + slot.id[n:], block + slot.name[n_block:], slot.shape, slot.kind, slot.is_optional, i,
                slot.formula, parts, slot.groups, slot.is_transposed, slot.stack,
            ))  # fmt: skip
        return moved

    def _slot(self, slot: str, shapes: list[tuple[str, SlotShape]], layer: int | None, place: Place) -> Slot:
        first, entry = shapes[0][1], place.entry
        stack = len(shapes) // len(entry.parts) if isinstance(entry, Stacked) else 0
        groups = self.dims.evaluate(entry.groups) if isinstance(entry, Fused) and entry.rows == "per_group" else 1
        parts = []
        for part, formulas in shapes:
            shape = tuple(self.dims.evaluate(formula) for formula in formulas.dims)
            if entry is not None and entry.rows == "interleaved":
                groups = shape[0]
            parts.append(Part(part, shape, (shape[0] if shape else 1) // groups))
        together = shapes[: len(shapes) // stack] if stack else shapes  # of one matrix
        rows = sum(p.shape[0] for p in parts[: len(together)]) if parts[0].shape else 0
        fused_shape = (rows, *parts[0].shape[1:]) if parts[0].shape else ()
        words = [" + ".join(self.dims.spell(formulas.dims[0]) for _, formulas in together)] if first.dims else [""]
        words += [self.dims.spell(formula) for formula in first.dims[1:]]
        if place.is_transposed:
            fused_shape, words = fused_shape[::-1], words[::-1]
        if stack:
            fused_shape, words = (stack, *fused_shape), [str(stack), *words]
        return Slot(
            id=slot,
            name=self.table.name(slot),
            shape=fused_shape,
            kind=first.kind,
            is_optional=first.is_optional,
            layer=layer,
            formula=", ".join(words),
            parts=tuple(parts),
            groups=groups,
            is_transposed=place.is_transposed,
            stack=stack,
        )

    def tensors(self) -> Mapping[str, Slot]:
        """Tensor name -> slot: every tensor that a checkpoint of this model has, or (optional ones) may have."""
        return self._by_name

    @cached_property
    def _by_name(self) -> Mapping[str, Slot]:
        return MappingProxyType({slot.name: slot for slot in self.slots.values()})

    def unread_weights(self) -> list[str]:
        """Names of weights in layers that the family's class may have beside those that it reads."""
        start = self.names.block.format(i="*")
        patterns = [name for name in self.names.ignored if name.startswith(start) and name.endswith(".weight")]
        names = [name.replace("*", str(i), 1) for name in patterns for i in range(len(self.blocks))]
        return [name for name in names if name not in self.tensors()]

    def name_of(self, slot: str) -> str:
        """The tensor name of a slot id; of a weight inside a slot, the name of the tensor that holds it."""
        return self.table.name(self.stored_in.get(slot, slot))

    def spelled(self, names: Names) -> Model:
        """The same model in another spelling: other names, other fusions."""
        return replace(self, names=names)

    def fitted(self, tensors: Iterable[str]) -> Model:
        """The same model as a checkpoint with tensors of these names spells it."""
        names = self.names.fitting(tensors)
        return self if names == self.names else self.spelled(names)

    @property
    def n_parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(slot.numel for slot in self.slots.values() if not slot.is_optional)

    def check(self, specs: Mapping[str, TensorSpec]) -> Report:
        """Compare the tensors of a checkpoint (as floats, quantized ones by their logical shape) with this model."""
        return compare(self.tensors(), specs, self.table, is_tied=self.is_tied)
