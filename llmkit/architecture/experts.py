"""Mixtures of experts: a router chooses a few MLPs for each token (Shazeer et al. 2017, arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from llmkit.architecture.keys import Flag, Number, as_bool, as_float
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under
from llmkit.architecture.kinds import GatedMLP
from llmkit.architecture.sizes import Sizes
from llmkit.errors import SpecError

_MOST_EXPERTS = 8192  # of a layer; sizes are believed before the tensors are looked at


@dataclass(frozen=True)
class ClampedSwiGLU(Kind):
    """(up + 1) * g * sigmoid(alpha * g), g = min(gate, limit) and up within ±limit: an `act` of experts (gpt-oss).

    Attributes:
        alpha: the slope of the sigmoid.
        limit: where both are cut.
    """

    string_keys = ("alpha", "limit")

    alpha: Number = 1.702
    limit: Number = 7.0


@dataclass(frozen=True)
class ExpertChoice(Kind):
    """What routers have in common: logits = x @ weight^T, of which some experts are chosen.

    Attributes:
        count: number of experts.
        top_k: how many of them each token goes to.
    """

    string_keys: ClassVar[tuple[str, ...]] = ("count", "top_k")

    count: Number
    top_k: Number

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        count, top_k = as_float(bound.count, "count"), as_float(bound.top_k, "top_k")
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
        return {"weight": SlotShape((str(self.n_experts), "hidden"), "parameter")}


@dataclass(frozen=True)
class Router(ExpertChoice):
    """Which experts a token goes to, and with which weights: those with the highest scores, which are the weights.

    Attributes:
        scores: `softmax` over all logits, `chosen_softmax` over those of the chosen, `sigmoid` of each, or
            `chosen_sigmoid`, where the logits themselves choose.
        is_normalized: the weights are divided by their sum.
        epsilon: added to that sum.
        scale: multiplies the weights at last.
        bias: whether the logits have one.
        correction: whether a vector is added to the scores for the choice alone (Wang et al. 2024, arXiv:2408.15664).
        correction_rows: a formula: "" for a vector [experts], "1" for a matrix [1, experts] (ERNIE 4.5).
        groups: experts are divided into so many groups, of which only the `top_groups` best can be chosen
            (DeepSeek-AI 2024, arXiv:2405.04434).
        group_score: a group is as good as its best expert (`max`), or as the sum of its best two (`top2`).
        is_single: logits are computed in float32 whatever the compute dtype.
    """

    string_keys = (*ExpertChoice.string_keys, "is_normalized", "scale", "bias", "correction", "groups", "top_groups")

    scores: Literal["softmax", "chosen_softmax", "sigmoid", "chosen_sigmoid"] = "softmax"
    is_normalized: Flag = False
    epsilon: float = 0.0
    scale: Number = 1.0
    bias: Flag = False
    correction: Flag = False
    correction_rows: str = ""
    groups: Number = 1
    top_groups: Number = 1
    group_score: Literal["max", "top2"] = "max"
    is_single: bool = False

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        groups, top_groups = as_float(bound.groups, "groups"), as_float(bound.top_groups, "top_groups")
        is_whole = all(size == int(size) and size >= 1 for size in (groups, top_groups))
        count, top_k = bound.n_experts, bound.n_chosen
        if not is_whole or count % groups or top_groups > groups or top_k > top_groups * count / groups:
            shown = f"{groups:g} groups, of which {top_groups:g} are chosen"
            raise SpecError(f"config.json: {top_k} of {count} experts cannot be chosen with {shown}")
        return bound

    @property
    def choice_of_groups(self) -> tuple[int, int]:
        """The groups there are, and how many of them can be chosen, of a bound kind."""
        return int(as_float(self.groups)), int(as_float(self.top_groups))

    def slots(self) -> dict[str, SlotShape]:
        slots, count = super().slots(), str(self.n_experts)
        if as_bool(self.bias):
            slots["bias"] = SlotShape((count,), "bias")
        if as_bool(self.correction):
            rows = (self.correction_rows,) if self.correction_rows else ()
            slots["correction"] = SlotShape((*rows, count), "bias")
        return slots


@dataclass(frozen=True)
class Experts(GatedMLP):
    """The weighted sum of the outputs of the chosen experts, each a gated MLP, and of a shared one.

    Attributes:
        act: as of other MLPs, or a kind that takes gate and up (`ClampedSwiGLU`).
        bias: whether the layers of the experts have biases.
        router: a `Router`, or a plugin's own kind; it has `n_experts` and `n_chosen`.
        width: a formula: the width of an expert.
        shared: a formula: the width of the MLP (one or several experts side by side) that every token goes through,
            whose output is added; None for none.
        shared_gate: whether that output is multiplied by the sigmoid of a linear layer of the input (Qwen2-MoE).
        weighs: the weights multiply the experts' outputs, or what they are given.
    """

    string_keys = ("bias", "shared_gate")

    router: Any = None
    width: str = "expert_ffn"
    shared: str | None = None
    shared_gate: Flag = False
    weighs: Literal["output", "input"] = "output"

    @property
    def n_experts(self) -> int:
        """The number of experts of a bound kind."""
        return int(self.router.n_experts)

    @property
    def has_shared_gate(self) -> bool:
        """Whether a bound kind has a gate for the shared MLP."""
        return as_bool(self.shared_gate)

    def slots(self) -> dict[str, SlotShape]:
        slots = under("router", self.router)
        for e in range(self.n_experts):
            slots |= _mlp(f"experts.{e}", self.width, self.bias)
        if self.shared is not None:
            slots |= _mlp("shared", self.shared, False)
        if self.has_shared_gate:
            slots["shared_gate.weight"] = SlotShape(("1", "hidden"), "parameter")
        return slots

    def words(self, dims: Sizes) -> str:
        return f"experts {self.n_experts} × {dims.evaluate(self.width)} ({self.router.n_chosen} a token)"

    def usage(self, leaf: str) -> float:
        return self.router.n_chosen / self.n_experts if leaf.startswith("experts.") else 1.0


def _mlp(stem: str, width: str, bias: Flag) -> dict[str, SlotShape]:
    return {
        **linear_slots(f"{stem}.gate", width, "hidden", bias),
        **linear_slots(f"{stem}.up", width, "hidden", bias),
        **linear_slots(f"{stem}.down", "hidden", width, bias),
    }
