"""The kind of RWKV-4's layer: its weights, and where its readers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmkit.architecture.kind import linear_slots, under
from llmkit.architecture.kinds import Kind, NoPositions, SlotShape

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.architecture.model import Model
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.positions import Positions
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.positions import GraphPositions
    from llmkit.onnx.weights import GraphWeights


@dataclass(frozen=True)
class TimeAndChannelMix(Kind):
    """One layer: x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    norm: Kind
    position: Kind = field(default_factory=NoPositions)

    def words(self, dims: Sizes) -> str:
        return f"time mix {dims.hidden}"

    def slots(self) -> dict[str, SlotShape]:
        slots = under("attn_norm", self.norm) | under("mlp_norm", self.norm)
        mixes = {"attn": ("key", "value", "receptance"), "mlp": ("key", "receptance")}
        for part, names in mixes.items():
            slots |= {f"{part}.mix_{name}": SlotShape(("1", "1", "hidden"), "parameter") for name in names}
        slots |= {f"attn.{name}": SlotShape(("hidden",), "parameter") for name in ("decay", "first")}
        linears = {"attn.k": ("hidden", "hidden"), "attn.v": ("hidden", "hidden"), "attn.r": ("hidden", "hidden"),
                   "attn.o": ("hidden", "hidden"), "mlp.key": ("ffn", "hidden"), "mlp.value": ("hidden", "ffn"),
                   "mlp.receptance": ("hidden", "hidden")}  # fmt: skip
        for name, (out, inside) in linears.items():
            slots |= linear_slots(name, out, inside, False)
        return slots

    def torch_reader(self, model: Model, weights: Weights, layer: int, positions: Positions) -> Layer:
        """The layer of the torch decoder."""
        from .mix import build_layer

        return build_layer(self, weights, layer)

    def onnx_emitter(
        self, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
    ) -> None:
        """The layer in a graph."""
        from .graph import emit_layer

        emit_layer(self, context, weights, layer, stream)
