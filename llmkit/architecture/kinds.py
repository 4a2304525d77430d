"""The kinds that decoders are built from: small frozen types, each with only its own fields.

A kind says which weights it has (`slots`: leaf name -> shape formula); readers (the torch decoder, the ONNX graph) are
looked up by the kind's type. Fields hold constants or `Key`s; `bind(config)` gives the same kind with plain values.
A shape formula is a product of dims: `heads*head_dim`, `hidden`, `3*hidden`.
A plugin may define kinds of its own: subclass `Kind`, and give it the readers' methods (`torch_reader`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from llmkit.architecture.keys import Flag, Key, Number, as_bool, bind_fields
from llmkit.architecture.scaling import NoScaling, Scaling, scaling_of

__all__ = [
    "Block",
    "GatedMLP",
    "GroupedQuery",
    "Head",
    "Kind",
    "PreNorm",
    "RMSNorm",
    "Rope",
    "SlotKind",
    "SlotShape",
]

# transformers 4 writes rope_theta and rope_scaling, transformers 5 one object; what is inside the object wins.
_THETA = Key(("rope_scaling.rope_theta", "rope_parameters.rope_theta", "rope_theta"), 10000.0)
_SCALING = Key(("rope_scaling", "rope_parameters"), None)

SlotKind = Literal["embedding", "linear", "norm", "bias", "head"]


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

    def bind(self, config: Mapping[str, Any]) -> Self:
        """The same kind with the values of one config."""
        return bind_fields(self, config, self.string_keys)

    def slots(self) -> dict[str, SlotShape]:
        """The weights of a bound kind: leaf name -> shape."""
        return {}


def _linear(name: str, out: str, inside: str, bias: Flag) -> dict[str, SlotShape]:
    slots = {f"{name}.weight": SlotShape((out, inside), "linear")}
    if as_bool(bias):
        slots[f"{name}.bias"] = SlotShape((out,), "bias")
    return slots


@dataclass(frozen=True)
class RMSNorm(Kind):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    string_keys = ("eps",)

    eps: Number
    width: str = "hidden"

    def slots(self) -> dict[str, SlotShape]:
        return {"weight": SlotShape((self.width,), "norm")}


@dataclass(frozen=True)
class GroupedQuery(Kind):
    """Causal softmax attention, each key/value head shared by heads/kv_heads query heads; scale 1/sqrt(head_dim).

    One group for all heads is multi-query, a group for each head is multi-head attention (Ainslie et al. 2023).
    """

    string_keys = ("qkv_bias", "out_bias")

    qkv_bias: Flag = False
    out_bias: Flag = False

    def slots(self) -> dict[str, SlotShape]:
        return {
            **_linear("q", "heads*head_dim", "hidden", self.qkv_bias),
            **_linear("k", "kv_heads*head_dim", "hidden", self.qkv_bias),
            **_linear("v", "kv_heads*head_dim", "hidden", self.qkv_bias),
            **_linear("o", "hidden", "heads*head_dim", self.out_bias),
        }


@dataclass(frozen=True)
class Rope(Kind):
    """Rotary positions over the whole head, the first half of its dims paired with the second (Su et al. 2021).

    Attributes:
        theta: the base of the frequencies.
        scaling: where the config keeps the scaling; bound, one of the types of `scaling.py`.
    """

    string_keys = ("theta",)

    theta: Number = _THETA
    scaling: Key | Scaling = _SCALING

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        if isinstance(self.scaling, Key):
            params: Any = bound.scaling
            return dataclasses.replace(bound, scaling=scaling_of(params, config))
        return bound

    @property
    def bound_scaling(self) -> Scaling:
        """The scaling of a bound kind."""
        return NoScaling() if isinstance(self.scaling, Key) else self.scaling


@dataclass(frozen=True)
class GatedMLP(Kind):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202).

    Attributes:
        act: the name of the activation, or a `Key` that holds it.
        bias: whether all three have biases.
    """

    string_keys = ("bias",)

    act: str | Key
    bias: Flag = False

    def slots(self) -> dict[str, SlotShape]:
        return {
            **_linear("gate", "ffn", "hidden", self.bias),
            **_linear("up", "ffn", "hidden", self.bias),
            **_linear("down", "hidden", "ffn", self.bias),
        }


@dataclass(frozen=True)
class PreNorm(Kind):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    norms: ClassVar[tuple[str, ...]] = ("attn_norm", "mlp_norm")


@dataclass(frozen=True)
class Block(Kind):
    """One layer of an attention decoder.

    Attributes:
        residual: how norms, attention and MLP are wired; its type names the norms there are.
    """

    norm: RMSNorm
    attention: GroupedQuery
    position: Rope
    mlp: GatedMLP
    residual: PreNorm = field(default_factory=PreNorm)

    def slots(self) -> dict[str, SlotShape]:
        parts: list[tuple[str, Kind]] = [(name, self.norm) for name in self.residual.norms]
        parts += [("attn", self.attention), ("mlp", self.mlp)]
        return {f"{part}.{leaf}": shape for part, kind in parts for leaf, shape in kind.slots().items()}


@dataclass(frozen=True)
class Head(Kind):
    """The output matrix: logits = hidden @ weight^T; `tied` shares the embedding's weight."""

    string_keys = ("tied",)

    tied: Flag = False

    def slots(self) -> dict[str, SlotShape]:
        return {"weight": SlotShape(("vocab", "hidden"), "head", is_optional=as_bool(self.tied))}
