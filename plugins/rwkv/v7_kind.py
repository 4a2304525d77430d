"""The kind of RWKV-7's layer: its weights, and where its readers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.architecture.kind import linear_slots, under
from llmkit.architecture.kinds import Kind, LayerNorm, SlotShape

from .v7_mix import MIXED, build_layer

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.architecture.model import Model
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.positions import Positions
    from llmkit.lazy_imports import torch
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.positions import GraphPositions
    from llmkit.onnx.weights import GraphWeights


@dataclass(frozen=True)
class FirstValues(Kind):
    """The values of the first layer, which all layers see; the order of tokens is the recurrence's."""

    def torch_reader(self, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
        """Its table is a place for those of one pass."""
        from llmkit.decoder.positions import Positions

        class Held(Positions):
            def table(self, input_ids: torch.Tensor, places: Any, cache: Any) -> dict[str, torch.Tensor]:
                return {}

        return Held()

    def onnx_emitter(self) -> GraphPositions:
        """A graph has them as a value."""
        from llmkit.onnx.positions import GraphPositions

        return GraphPositions()


@dataclass(frozen=True)
class GeneralizedDelta(Kind):
    """One layer: x + time_mix(norm(x)), then x + channel_mix(norm(x)) (Peng et al. 2025, arXiv:2503.14456).

    Attributes:
        norm: of both.
        head_norm: of each head of what the time mix reads from its state.
        is_first: whether it is the first layer, whose values later ones mix with theirs.
    """

    norm: LayerNorm
    head_norm: LayerNorm
    is_first: bool = False
    position: Kind = FirstValues()
    needs_layers_before: ClassVar[str] = "the values of the first"

    def words(self, dims: Sizes) -> str:
        return f"heads {dims.heads} × {dims.head_dim}"

    def slots(self) -> dict[str, SlotShape]:
        slots = under("attn_norm", self.norm) | under("mlp_norm", self.norm)
        slots |= {f"attn.mix_{name}": SlotShape(("1", "1", "hidden"), "parameter") for name in MIXED}
        slots |= {f"attn.{name}": SlotShape(("hidden",), "parameter") for name in ("k_k", "k_a")}
        slots["attn.r_k"] = SlotShape(("heads", "head_dim"), "parameter")
        for name in ("r", "k", "v", "o"):
            slots |= linear_slots(f"attn.{name}", "hidden", "hidden", False)
        for name in ("w", "a", "g") if self.is_first else ("w", "a", "v", "g"):
            slots |= linear_slots(f"attn.{name}_down", f"{name}_rank", "hidden", False)
            slots |= linear_slots(f"attn.{name}_up", "hidden", f"{name}_rank", name != "g")
        slots |= under("attn.head_norm", self.head_norm)
        slots["mlp.mix_k"] = SlotShape(("hidden",), "parameter")
        slots |= linear_slots("mlp.key", "ffn", "hidden", False)
        return slots | linear_slots("mlp.value", "hidden", "ffn", False)

    def torch_reader(self, model: Model, weights: Weights, layer: int, positions: Positions) -> Layer:
        """The layer of the torch decoder."""
        return build_layer(self, model.dims, weights, layer)

    def onnx_emitter(
        self, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
    ) -> Any:
        """The layer in a graph."""
        from .v7_graph import emit_layer

        emit_layer(self, context, weights, layer, stream)
