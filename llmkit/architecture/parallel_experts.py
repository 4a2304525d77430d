"""A dense MLP and a mixture of experts side by side, and a router of its own for them (Gemma 4 26B-A4B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.architecture.experts import ExpertChoice, Experts
from llmkit.architecture.kind import Kind, SlotShape, under
from llmkit.architecture.kinds import GatedMLP, Sandwich


@dataclass(frozen=True)
class ScaledRouter(ExpertChoice):
    """The top k of softmax((norm(x) * scale / sqrt(hidden)) W^T), divided by their sum, times a number of each expert.

    Attributes:
        norm: of what it is given; without a weight.
    """

    norm: Kind | Any

    def slots(self) -> dict[str, SlotShape]:
        scales = {"scale": "hidden", "expert_scale": str(self.n_experts)}
        return super().slots() | {name: SlotShape((size,), "norm") for name, size in scales.items()}


@dataclass(frozen=True)
class ParallelExperts(Kind):
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
class OpenSandwich(Sandwich):
    """x + post(attn(pre(x))), then x + post(mlp(pre(x), x)): the MLP is given both."""
