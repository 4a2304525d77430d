"""Alternating updates: several streams of hidden states, of which a layer computes one and corrects all (Gemma 3n).

Baykal et al. 2023, arXiv:2301.13310. Layers pass on [stream 0 | stream 1 | … | inputs | shared keys] (see
`layer_inputs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llmkit.architecture.keys import Flag, Number, as_bool, as_float
from llmkit.architecture.kind import Kind, SlotShape, linear_slots
from llmkit.architecture.kinds import RMSNorm
from llmkit.architecture.layer_inputs import LayerInputBlock, LayerInputs
from llmkit.errors import SpecError

_MOST_STREAMS = 64  # sizes are believed before the tensors are looked at
LEAST_SQUARE = 1e-5
"""Of a projected stream, before it gets the length of the first."""


def streams_of(value: Any) -> int:
    """How many streams there are, of a key's value.

    Raises:
        SpecError: it is no whole number from 2 on.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= _MOST_STREAMS:
        raise SpecError(f"config.json: altup_num_inputs is {value!r:.60}, expected a whole number from 2 on")
    return value


def _stream_slots(streams: int) -> dict[str, SlotShape]:
    """The projections of the streams after the first."""
    projections = (linear_slots(f"stream.{i}", "hidden", "hidden", False) for i in range(1, streams))
    return {leaf: shape for slots in projections for leaf, shape in slots.items()}


@dataclass(frozen=True)
class AltUpInputs(LayerInputs):
    """Stream 0 is the embedding x; stream i is x P_i^T, as long as x. Inputs of layers beside them.

    Attributes:
        streams: how many.
    """

    streams: Any = 4

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        streams_of(bound.streams)
        return bound

    def slots(self) -> dict[str, SlotShape]:
        return super().slots() | _stream_slots(self.streams)


@dataclass(frozen=True)
class AltUpBlock(LayerInputBlock):
    """h' = h + R h with R = predict(m(h_a)), a layer on stream a, then h'_i + (1 + correct(m(y))_i) (y - h'_a).

    m(x) = tanh(router(norm(x) / hidden)). The layer has a low-rank branch beside attention (LAuReL, Menghani et al.
    2024, arXiv:2411.07501): x = (h'_a + post(attn(z)) + z + norm(right(left(z)))) / sqrt(2) of z = pre(h'_a), then
    y = x + post(mlp(pre(x))). The gate sees corrected stream a; its output is added to all streams but the first.

    Attributes:
        streams: how many.
        active: the one that the layer computes.
        output_scaled: whether what the gate sees is scaled by a weight (which is there anyhow).
        rank: of the branch.
    """

    string_keys = ("streams", "active", "output_scaled", "rank")

    streams: Any = 4
    active: Number = 0
    output_scaled: Flag = True
    rank: Number = 64

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        rank, active = as_float(bound.rank, "laurel_rank"), as_float(bound.active, "altup_active_idx")
        if rank < 1 or rank != int(rank) or not 0 <= active < streams_of(bound.streams) or active != int(active):
            raise SpecError(f"config.json: laurel_rank {rank:g} and altup_active_idx {active:g} describe no layer")
        return bound

    @property
    def index(self) -> int:
        """The stream that a bound layer computes."""
        return int(as_float(self.active))

    @property
    def scales_output(self) -> bool:
        """Whether a bound layer scales what its gate sees."""
        return as_bool(self.output_scaled)

    def slots(self) -> dict[str, SlotShape]:
        n, rank = str(self.streams), str(int(as_float(self.rank)))
        return {
            **super().slots(),
            "altup.router.weight": SlotShape((n, "hidden"), "parameter"),
            "altup.router_norm.weight": SlotShape(("hidden",), "norm"),
            "altup.predict.weight": SlotShape((f"{n}*{n}", n), "parameter"),
            "altup.correct.weight": SlotShape((n, n), "parameter"),
            "altup.scale": SlotShape(("hidden",), "norm"),
            **linear_slots("laurel.left", rank, "hidden", False),
            **linear_slots("laurel.right", "hidden", rank, False),
            "laurel.norm.weight": SlotShape(("hidden",), "norm"),
        }


@dataclass(frozen=True)
class AltUpNorm(RMSNorm):
    """RMSNorm of the mean of all streams, those after the first projected and as long as it.

    Attributes:
        streams: how many.
    """

    streams: Any = 4

    def slots(self) -> dict[str, SlotShape]:
        return super().slots() | _stream_slots(self.streams)


@dataclass(frozen=True)
class GaussianTopK(Kind):
    """act(relu(gate - mean - q * std)) * up, mean and std of a token's gate: an `act` of a gated MLP (Gemma 3n).

    Attributes:
        act: the activation.
        sparsity: about this part of a token's gate becomes 0; q is the quantile of a normal distribution for it.
    """

    string_keys = ("sparsity",)

    act: Any
    sparsity: Number

    @property
    def quantile(self) -> float:
        """The q of a bound kind."""
        from statistics import NormalDist

        return NormalDist().inv_cdf(as_float(self.sparsity))

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        if not 0 < as_float(bound.sparsity) < 1:
            raise SpecError(f"config.json: activation_sparsity_pattern has {bound.sparsity!r}, expected 0 to below 1")
        return bound
