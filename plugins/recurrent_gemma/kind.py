"""The gated linear recurrence of Griffin (De et al. 2024, arXiv:2402.19427, section 2.4), and its readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmkit.architecture.activations import same_activation
from llmkit.architecture.keys import as_text
from llmkit.architecture.kind import Kind, SlotShape, linear_slots
from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.kv import Cache
    from llmkit.decoder.positions import Positions
    from llmkit.decoder.states import State
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.positions import GraphPositions
    from llmkit.onnx.weights import GraphWeights


@dataclass(frozen=True)
class GatedRecurrence(Kind):
    """out(h * act(y(x))), where h is a recurrence of each channel over u = conv(x(x)):

        h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t u_t,   a_t = exp(-8 r_t softplus(rate))

    with i = sigmoid(input_gate(u)) and r = sigmoid(recurrent_gate(u)), a matrix for each head's channels. The first
    token of a sequence has no root before it.

    State of a layer: the window of the convolution [B, K - 1, lru], h [B, lru] float32, and [B, 1] float32: 1 once
    there was a token.
    """

    string_keys: ClassVar[tuple[str, ...]] = ()
    pace: ClassVar[float] = 8.0

    act: str | Any

    def bind(self, config: Mapping[str, Any]) -> Self:
        bound = super().bind(config)
        return replace(bound, act=same_activation(as_text(bound.act)))

    def words(self, dims: Sizes) -> str:
        return f"gated recurrence {dims.extra['lru']}"

    def slots(self) -> dict[str, SlotShape]:
        slots = {**linear_slots("x", "lru", "hidden", True), **linear_slots("y", "lru", "hidden", True)}
        slots["conv.weight"] = SlotShape(("lru", "1", "kernel"), "parameter")
        slots["conv.bias"] = SlotShape(("lru",), "bias")
        slots["rate"] = SlotShape(("lru",), "parameter")
        for gate in ("input_gate", "recurrent_gate"):
            slots[gate] = SlotShape(("heads", "lru_part", "lru_part"), "parameter")
            slots[f"{gate}_bias"] = SlotShape(("heads", "lru_part"), "bias")
        return slots | linear_slots("out", "hidden", "lru", True)

    def torch_reader(self, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
        """The layer of the torch decoder."""
        from llmkit.decoder.gated import activation
        from llmkit.decoder.linear import linear
        from llmkit.decoder.states import short_convolution

        x_of, y_of, out = (linear(weights, name) for name in ("x", "y", "out"))
        act, taps, bias = activation(str(self.act)), weights("conv.weight"), weights("conv.bias")
        gates = [(weights(name), weights(f"{name}_bias")) for name in ("input_gate", "recurrent_gate")]
        pace = -self.pace * torch.nn.functional.softplus(weights("rate"))

        def run(x: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
            if state is None:
                state = (x.new_zeros(len(x), len(taps[0, 0]) - 1, x.shape[-1]),
                         x.new_zeros(len(x), x.shape[-1], dtype=torch.float32),
                         x.new_zeros(len(x), 1, dtype=torch.float32))  # fmt: skip
            u, window = short_convolution(x, taps, bias, state[0], real)
            heads = u.unflatten(-1, (dims.heads, -1)).transpose(1, 2)
            opened, kept = ((heads @ w + b[:, None]).sigmoid().transpose(1, 2).flatten(2) for w, b in gates)
            counted = torch.ones_like(u[..., :1], dtype=torch.float32) if real is None else real[..., None].float()
            decay = (kept * pace).float() * counted
            scale = (1 - (2 * decay).exp()).sqrt()
            after = counted.cumsum(1) + state[2][:, None]
            added = (u * opened).float() * torch.where(after < 2, counted, scale * counted)
            held, decay = state[1], decay.exp()
            for t in range(added.shape[1]):
                held = torch.addcmul(added[:, t], decay[:, t], held)
                added[:, t] = held
            return added.to(x.dtype), (window, held, after[:, -1].clamp(max=1))

        def mix(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
            return out(cache.recur(layer, run, x_of(x)) * act(y_of(x)))

        return mix

    def onnx_emitter(
        self, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Any
    ) -> Any:
        """The layer in a graph."""
        from .graph import emit_recurrence

        return emit_recurrence(self, context, weights, layer, x)
