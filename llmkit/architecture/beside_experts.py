"""A dense MLP and a mixture of experts side by side, and a router of its own for them (Gemma 4 26B-A4B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from llmkit.architecture.experts import Experts
from llmkit.architecture.keys import Number, as_float
from llmkit.architecture.kind import Kind, SlotShape, under
from llmkit.architecture.kinds import GatedMLP
from llmkit.errors import SpecError

_MOST_EXPERTS = 8192  # of a layer; sizes are believed before the tensors are looked at


@dataclass(frozen=True)
class ScaledRouter(Kind):
    """The top k of softmax((norm(x) * scale / sqrt(hidden)) W^T), divided by their sum, times a number of each expert.

    Attributes:
        count: number of experts.
        top_k: how many of them each token goes to.
        norm: of what it is given; without a weight.
    """

    string_keys = ("count", "top_k")

    count: Number
    top_k: Number
    norm: Kind | Any

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        count, top_k = (as_float(x, name) for x, name in ((bound.count, "num_experts"), (bound.top_k, "top_k_experts")))
        if not 1 <= top_k <= count <= _MOST_EXPERTS or count != int(count) or top_k != int(top_k):
            raise SpecError(f"config.json: {top_k:g} experts for each token cannot be chosen of {count:g}")
        return bound

    @property
    def n_experts(self) -> int:
        """The number of experts of a bound kind."""
        return int(as_float(self.count))

    @property
    def n_chosen(self) -> int:
        """How many experts a token goes to, of a bound kind."""
        return int(as_float(self.top_k))

    def slots(self) -> dict[str, SlotShape]:
        count = str(self.n_experts)
        return {
            "weight": SlotShape((count, "hidden"), "parameter"),
            "scale": SlotShape(("hidden",), "norm"),
            "expert_scale": SlotShape((count,), "norm"),
        }


@dataclass(frozen=True)
class BesideExperts(Kind):
    """post(dense(y)) + post'(experts(pre'(x))) of x and y = norm(x); the router sees x itself (see `OpenSandwich`).

    Attributes:
        norm: of all three.
        dense: the MLP that every token goes through.
        experts: the mixture.
    """

    norm: Kind | Any
    dense: GatedMLP | Any
    experts: Experts | Any

    def slots(self) -> dict[str, SlotShape]:
        slots: dict[str, SlotShape] = {}
        for name in ("dense_post_norm", "experts_norm", "experts_post_norm"):
            slots |= under(name, self.norm)
        return slots | self.dense.slots() | self.experts.slots()

    def usage(self, leaf: str) -> float:
        return float(self.experts.usage(leaf))


@dataclass(frozen=True)
class OpenSandwich(Kind):
    """x + post(attn(pre(x))), then x + post(mlp(pre(x), x)): the MLP is given both."""

    norms: ClassVar[tuple[str, ...]] = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
