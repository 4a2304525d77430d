"""Per-layer embeddings, and keys and values that later layers share (Gemma 3n and 4).

Layers pass on [hidden | inputs of all layers | shared keys and values]: the embedding makes the inputs and appends
zeros for the rest (`LayerInputs`), each layer has fixed columns, and the final norm takes the hidden states alone
(`HiddenNorm`). Column numbers count from the end of the hidden states.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.keys import Flag, as_bool
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under
from llmkit.architecture.kinds import Block, NoNorm, RMSNorm
from llmkit.errors import SpecError


@dataclass(frozen=True)
class LayerInputs(Kind):
    """Per-layer embeddings (Gemma 3n): layer i takes (norm(x P_i^T / sqrt(hidden)) + sqrt(width) * E_i[id]) / sqrt(2).

    Attributes:
        rows: of the table; an id without a row has the first.
        layers: how many.
        width: of one layer's input; 0 for no inputs.
        norm: of the projections, of that width.
        room: columns for shared keys and values.
    """

    rows: Any
    layers: Any
    width: Any
    norm: Kind | Any
    room: Any = 0

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        for name in ("rows", "layers", "width"):
            size = getattr(bound, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < (name != "width"):
                raise SpecError(f"config.json: per-layer embeddings have {size!r} {name}, expected a whole number")
        return bound

    @property
    def columns(self) -> int:
        """The inputs of all layers."""
        return int(self.layers * self.width)

    def slots(self) -> dict[str, SlotShape]:
        if not self.width:
            return {}
        columns = str(self.columns)
        slots = {"table.weight": SlotShape((str(self.rows), columns), "embedding")}
        return slots | linear_slots("project", columns, "hidden", False) | under("norm", self.norm)


@dataclass(frozen=True)
class InputGate(Kind):
    """norm(out(act(gate(x)) * e)), e the layer's input.

    Attributes:
        act: the activation.
        width: of the input.
        at: its first column.
        norm: of what is added.
    """

    act: Any
    width: int
    at: int
    norm: Kind | Any

    def slots(self) -> dict[str, SlotShape]:
        width = str(self.width)
        slots = {**linear_slots("gate", width, "hidden", False), **linear_slots("out", "hidden", width, False)}
        return slots | under("norm", self.norm)


@dataclass(frozen=True)
class NormedValues(GroupedQuery):
    """Grouped-query attention whose values are normed, too.

    Attributes:
        v_norm: of each head of values.
        from_keys: values are the projected keys, before these are normed: there is no matrix of values.
        shared_kv_at: the first column for keys and values that later layers use; None for a layer that shares none.
    """

    v_norm: Kind | Any = field(default_factory=NoNorm)
    from_keys: Flag = False
    shared_kv_at: int | None = None

    @property
    def has_own_values(self) -> bool:
        """Whether a bound kind has a matrix of values."""
        return not as_bool(self.from_keys)

    def slots(self) -> dict[str, SlotShape]:
        slots = super().slots() | under("v_norm", self.v_norm)
        return {leaf: shape for leaf, shape in slots.items() if self.has_own_values or leaf not in _VALUES}


@dataclass(frozen=True)
class SharedKeys(GroupedQuery):
    """Attention to the keys and values of an earlier layer (Sun et al. 2024, arXiv:2405.05254).

    Attributes:
        source: the layer.
        at: the first column of its keys, which its values follow.
    """

    source: int = 0
    at: int = 0

    def slots(self) -> dict[str, SlotShape]:
        own = ("q", "o", "q_norm")
        return {leaf: shape for leaf, shape in super().slots().items() if leaf.partition(".")[0] in own}

    def widths(self, dims: Any) -> tuple[int, int]:
        return super().widths(dims)[0], 0


@dataclass(frozen=True)
class LayerInputBlock(Block):
    """A block that passes the columns beside the hidden states on, then adds an input gate and multiplies by a scalar.

    Attributes:
        gate: an `InputGate`, whose output is added; `NoNorm` for none.
        scaled: whether there is a scalar.
    """

    gate: Kind | Any = field(default_factory=NoNorm)
    scaled: bool = False

    def slots(self) -> dict[str, SlotShape]:
        slots = super().slots() | under("input", self.gate)
        return slots | ({"input.scalar": SlotShape(("1",), "parameter")} if self.scaled else {})


@dataclass(frozen=True)
class HiddenNorm(RMSNorm):
    """RMSNorm of the hidden states, without the columns beside them."""


_VALUES = ("v.weight", "v.bias")


@dataclass(frozen=True)
class KVSharing:
    """Which layers use the keys and values of which.

    Attributes:
        sources: layer without its own keys and values -> the layer whose it uses.
        columns: layer that shares its own -> their first column.
        room: columns of all of them.
    """

    sources: Mapping[int, int]
    columns: Mapping[int, int]
    room: int


def kv_sharing(sorts: Sequence[Hashable], n_shared: int, at: int, widths: Sequence[int]) -> KVSharing:
    """The last `n_shared` layers each use the keys and values of the last earlier layer of their type.

    Args:
        sorts: the type of each layer.
        at: the first free column.
        widths: of each layer, the numbers in a token's keys and values.

    Raises:
        SpecError: there is no such layer.
    """
    first, sources, columns, end = len(sorts) - n_shared, {}, {}, at
    for i in range(max(first, 0), len(sorts)):
        source = next((j for j in range(first - 1, -1, -1) if sorts[j] == sorts[i]), None)
        if source is None:
            raise SpecError(f"config.json: layer {i} takes the keys of another of its sort, and none has its own")
        sources[i] = source
        if source not in columns:
            columns[source], end = end, end + widths[source]
    return KVSharing(sources, columns, end - at)


def count_in(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number from 0 on.

    Raises:
        SpecError: the key holds something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SpecError(f"config.json: {key} is {value!r:.60}, expected a whole number")
    return value
