"""The kinds that decoders are built from: small frozen types, each with only its own fields (see `kind.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from llmkit.architecture.activations import same_activation
from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.keys import Computed, Flag, Key, Number, as_bool, as_float, as_optional
from llmkit.architecture.kind import Kind, SlotKind, SlotShape, linear_slots, under
from llmkit.architecture.positions import Alibi, LearnedPositions, NoPositions, Rope, SinusoidalPositions, rotated_share

__all__ = [
    "Alibi",
    "Block",
    "Embedding",
    "GatedMLP",
    "GroupedQuery",
    "Head",
    "HeadNorm",
    "Kind",
    "LayerNorm",
    "LearnedPositions",
    "NoNorm",
    "NoPositions",
    "NormedResidual",
    "OutputNorm",
    "Parallel",
    "PerLayer",
    "PlainMLP",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Residual",
    "Rope",
    "Sandwich",
    "SharedParallel",
    "SinusoidalPositions",
    "SlotKind",
    "SlotShape",
    "UnitRMS",
    "rotated_share",
]


_TIED = Key("tie_word_embeddings", False)


@dataclass(frozen=True)
class NoNorm(Kind):
    """x as it is."""


@dataclass(frozen=True)
class _Norm(Kind):
    """What norms with a weight have in common.

    Attributes:
        eps: added to the variance, or to the mean square.
        width: a formula: the length of the weight.
        offset: added to the weight; where it is not 0 the product is taken in float32 too (Gemma, Nemotron: weight - 1
            is stored).
    """

    eps: Number
    width: str = field(default="hidden", kw_only=True)
    offset: float = field(default=0.0, kw_only=True)

    @property
    def epsilon(self) -> float:
        """The eps of a bound kind."""
        return as_float(self.eps)


@dataclass(frozen=True)
class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    string_keys = ("eps",)

    def slots(self) -> dict[str, SlotShape]:
        return {"weight": SlotShape((self.width,), "norm")}


@dataclass(frozen=True)
class UnitRMS(Kind):
    """x / sqrt(mean(x^2) + eps), in float32: RMSNorm without a weight."""

    string_keys = ("eps",)

    eps: Number

    @property
    def epsilon(self) -> float:
        """The eps of a bound kind."""
        return as_float(self.eps)


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    Attributes:
        bias: whether there is one.
        affine: whether there are a weight and a bias at all.
    """

    string_keys = ("eps", "bias", "affine")

    bias: Flag = True
    affine: Flag = True

    def slots(self) -> dict[str, SlotShape]:
        slots = {"weight": SlotShape((self.width,), "norm")}
        if as_bool(self.bias):
            slots["bias"] = SlotShape((self.width,), "bias")
        return slots if as_bool(self.affine) else {}


@dataclass(frozen=True)
class HeadNorm(Kind):
    """LayerNorm over the dims of each head, without bias, in float32; the heads have a weight [head_dim] each.

    Attributes:
        eps: added to the variance.
        heads: a formula: their number.
        is_apart: the weights are stored one by one (`heads` is a number then), else as [heads, head_dim].
    """

    eps: Number
    heads: str
    is_apart: bool = False

    @property
    def epsilon(self) -> float:
        """The eps of a bound kind."""
        return as_float(self.eps)

    @property
    def leaves(self) -> list[str]:
        """The names of the weights."""
        return [f"{j}.weight" for j in range(int(self.heads))] if self.is_apart else ["weight"]

    def slots(self) -> dict[str, SlotShape]:
        dims = ("head_dim",) if self.is_apart else (self.heads, "head_dim")
        return {leaf: SlotShape(dims, "norm") for leaf in self.leaves}


@dataclass(frozen=True)
class _MLP(Kind):
    """What MLPs have in common.

    Attributes:
        act: the name of the activation, or a `Key` that holds it.
    """

    string_keys: ClassVar[tuple[str, ...]] = ("bias",)

    act: str | Any

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        return replace(bound, act=same_activation(bound.act)) if isinstance(bound.act, str) else bound


@dataclass(frozen=True)
class GatedMLP(_MLP):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202).

    Attributes:
        bias: whether all three have biases.
        multipliers: of gate(x), and of what the MLP gives (Falcon-H1); None for 1.
        width: a formula: of gate and up.
    """

    bias: Flag = False
    multipliers: Computed | tuple[float, float] | None = None
    width: str = "ffn"

    def slots(self) -> dict[str, SlotShape]:
        return {
            **linear_slots("gate", self.width, "hidden", self.bias),
            **linear_slots("up", self.width, "hidden", self.bias),
            **linear_slots("down", "hidden", self.width, self.bias),
        }


@dataclass(frozen=True)
class PlainMLP(_MLP):
    """down(act(up(x))).

    Attributes:
        bias: whether both have biases.
    """

    bias: Flag = True

    def slots(self) -> dict[str, SlotShape]:
        return {**linear_slots("up", "ffn", "hidden", self.bias), **linear_slots("down", "hidden", "ffn", self.bias)}


@dataclass(frozen=True)
class Residual(Kind):
    """How norms, attention and MLP of a layer are wired.

    Attributes:
        norms: the names of the norms that there are.
    """

    norms: ClassVar[tuple[str, ...]] = ("attn_norm", "mlp_norm")


@dataclass(frozen=True)
class PreNorm(Residual):
    """x + attn(norm(x)), then x + mlp(norm(x))."""


@dataclass(frozen=True)
class PostNorm(Residual):
    """norm(x + attn(x)), then norm(x + mlp(x)) (Vaswani et al. 2017)."""


@dataclass(frozen=True)
class NormedResidual(Residual):
    """alpha y + attn(y) with y = norm(x), then the same with the MLP: the sums start from the normed states."""

    alpha: float = 1.0


@dataclass(frozen=True)
class Parallel(Residual):
    """x + attn(norm(x)) + mlp(norm'(x)), each with a norm of its own."""


@dataclass(frozen=True)
class SharedParallel(Residual):
    """x + attn(y) + mlp(y) with y = norm(x)."""

    norms: ClassVar[tuple[str, ...]] = ("attn_norm",)


@dataclass(frozen=True)
class Sandwich(Residual):
    """x + post(attn(pre(x))), then x + post(mlp(pre(x)))."""

    norms: ClassVar[tuple[str, ...]] = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")


@dataclass(frozen=True)
class OutputNorm(Residual):
    """x + post(attn(x)), then x + post(mlp(x)) (OLMo team 2024, arXiv:2501.00656)."""

    norms: ClassVar[tuple[str, ...]] = ("attn_post_norm", "mlp_post_norm")


@dataclass(frozen=True)
class Block(Kind):
    """One layer of an attention decoder; `Computed` may choose each of its kinds.

    Attributes:
        residual: how norms, attention and MLP are wired; its type names the norms there are.
        multiplier: of what attention and MLP give, before it is added (Granite, MiniCPM); None for 1.
    """

    norm: Kind | Any
    attention: Kind | Any
    position: Kind | Any
    mlp: Kind | Any
    residual: Any = field(default_factory=PreNorm)
    multiplier: Number | None = None

    @property
    def branch_scale(self) -> float | None:
        """The multiplier of a bound kind; None for none."""
        return as_optional(self.multiplier)

    def slots(self) -> dict[str, SlotShape]:
        slots: dict[str, SlotShape] = {}
        for name in self.residual.norms:
            slots |= under(name, self.norm)
        return slots | under("attn", self.attention) | under("mlp", self.mlp)

    def usage(self, leaf: str) -> float:
        part, _, inside = leaf.partition(".")
        return float(self.mlp.usage(inside)) if part == "mlp" else 1.0


@dataclass(frozen=True)
class PerLayer:
    """Layers that are not all alike.

    Attributes:
        of: the (unbound) block of layer i, from the config.
    """

    of: Callable[[Mapping[str, Any], int], Kind]


@dataclass(frozen=True)
class Embedding(Kind):
    """How token ids become the first hidden states.

    Attributes:
        width: a formula, or `Computed`; where it is not `hidden`, a matrix [hidden, width] follows (slot `embed_proj`).
        scale: multiplies the rows, rounded to the compute dtype first (as Gemma has it); None for 1.
        norm: applied to the rows.
        positions: `LearnedPositions` or `SinusoidalPositions`, added to them.
        beside: what layers take besides hidden states (`LayerInputs`); `NoNorm` for nothing.
    """

    width: str | Any = "hidden"
    scale: Number | None = None
    norm: Kind | Any = field(default_factory=NoNorm)
    positions: Kind = field(default_factory=NoPositions)
    beside: Kind | Any = field(default_factory=NoNorm)

    @property
    def multiplier(self) -> float | None:
        """The scale of a bound kind; None for none."""
        return as_optional(self.scale)

    def slots(self) -> dict[str, SlotShape]:
        slots = {"embed.weight": SlotShape(("vocab", self.width), "embedding")}
        if self.width != "hidden":
            slots["embed_proj.weight"] = SlotShape(("hidden", self.width), "linear")
        slots |= under("positions", self.positions) | under("embed_norm", self.norm)
        return slots | under("beside", self.beside)


@dataclass(frozen=True)
class Head(Kind):
    """The output matrix: logits = hidden @ weight^T.

    Attributes:
        tied: whether it is the embedding's; by default as `tie_word_embeddings` says, and not where that is absent.
        bias: added to the logits.
        scale: multiplies the logits, after the bias; None for 1.
        softcap: logits become c * tanh(logit / c), after the scale; None for none.
        normalized: rows of the weight are divided by their L2 norm (Baichuan 2's NormHead).
        width: a formula, or `Computed`; where it is not `hidden`, [width, hidden] comes first (slot `head_proj`).
    """

    string_keys = ("tied", "bias", "normalized")

    tied: Flag = _TIED
    bias: Flag = False
    scale: Number | None = None
    softcap: Number | None = None
    normalized: Flag = False
    width: str | Any = "hidden"

    @property
    def is_normalized(self) -> bool:
        """Whether a bound kind divides rows by their norms."""
        return as_bool(self.normalized)

    @property
    def multiplier(self) -> float | None:
        """The scale of a bound kind; None for none."""
        return as_optional(self.scale)

    @property
    def cap(self) -> float | None:
        """The softcap of a bound kind; None for none."""
        return as_optional(self.softcap)

    def slots(self) -> dict[str, SlotShape]:
        slots = {"head.weight": SlotShape(("vocab", self.width), "head", is_optional=as_bool(self.tied))}
        if as_bool(self.bias):
            slots["head.bias"] = SlotShape(("vocab",), "bias")
        if self.width != "hidden":
            slots["head_proj.weight"] = SlotShape((self.width, "hidden"), "linear")
        return slots
