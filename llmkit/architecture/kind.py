"""The base of all kinds, and the shapes of their weights.

A kind says which weights it has (`slots`: leaf name -> shape formula); readers (the torch decoder, the ONNX graph) are
looked up by the kind's type. Fields hold constants, `Key`s or `Computed` values; `bind(config)` gives the same kind
with plain values. A shape formula is a product of dims: `heads*head_dim`, `hidden`, `3*hidden`.
A plugin may define kinds of its own: subclass `Kind`, and give it the readers' methods (`torch_reader`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from llmkit.architecture.keys import Flag, as_bool, bind_fields

if TYPE_CHECKING:
    from llmkit.architecture.sizes import Sizes

SlotKind = Literal["embedding", "linear", "norm", "bias", "head", "parameter"]


@dataclass(frozen=True, slots=True)
class SlotShape:
    """The shape of a weight as a formula of dims, and what sort of weight it is."""

    dims: tuple[str, ...]
    kind: SlotKind
    is_optional: bool = False


@dataclass(frozen=True)
class Kind:
    """The base of all kinds."""

    string_keys: ClassVar[tuple[str, ...]] = ()
    """Fields in which a bare string is the name of a config key."""

    needs_layers_before: ClassVar[str] = ""
    """What a layer takes of those before it besides their output, so that none is computed alone; empty for nothing."""

    def bind(self, config: Mapping[str, Any]) -> Self:
        """The same kind with the values of one config."""
        return bind_fields(self, config, self.string_keys)

    def slots(self) -> dict[str, SlotShape]:
        """The weights of a bound kind: leaf name -> shape."""
        return {}

    def words(self, dims: Sizes) -> str:
        """What `inspect` says of the sizes of a bound kind; empty for nothing."""
        return ""

    def usage(self, leaf: str) -> float:
        """The part of all tokens that go through a weight of a bound kind."""
        return 1.0


def linear_slots(name: str, out: str, inside: str, bias: Flag) -> dict[str, SlotShape]:
    """The slots of a linear layer [out, in] with or without bias."""
    slots = {f"{name}.weight": SlotShape((out, inside), "linear")}
    if as_bool(bias):
        slots[f"{name}.bias"] = SlotShape((out,), "bias")
    return slots


def under(stem: str, kind: Kind) -> dict[str, SlotShape]:
    """The slots of `kind` below `stem`."""
    return {f"{stem}.{leaf}": shape for leaf, shape in kind.slots().items()}
