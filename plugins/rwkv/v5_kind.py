"""The kinds of RWKV-5's and RWKV-6's layers: their weights, and where their readers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from llmkit.architecture.kind import linear_slots, under
from llmkit.architecture.kinds import Kind, LayerNorm, NoPositions, SlotShape

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
class Eagle(Kind):
    """One layer of RWKV-5: x + time_mix(norm(x)), then x + channel_mix(norm(x)) (Peng et al. 2024, arXiv:2404.05892).

    Attributes:
        norm: of both.
        head_norm: of each head of what the time mix reads from its state.
    """

    norm: LayerNorm
    head_norm: LayerNorm
    position: Kind = field(default_factory=NoPositions)

    mixed: ClassVar[tuple[str, ...]] = ("k", "v", "r", "g")
    decays: ClassVar[tuple[str, ...]] = ("heads", "head_dim")
    is_by_token: ClassVar[bool] = False

    def words(self, dims: Sizes) -> str:
        return f"heads {dims.heads} × {dims.head_dim}"

    def slots(self) -> dict[str, SlotShape]:
        slots = under("attn_norm", self.norm) | under("mlp_norm", self.norm) | under("attn.head_norm", self.head_norm)
        shares = [*(f"attn.mix_{name}" for name in self.mixed), "mlp.mix_k", "mlp.mix_r"]
        slots |= {share: SlotShape(("1", "1", "hidden"), "parameter") for share in shares}
        slots["attn.decay"] = SlotShape(self.decays, "parameter")
        slots["attn.first"] = SlotShape(("heads", "head_dim"), "parameter")
        for name in ("r", "k", "v", "g", "o"):
            slots |= linear_slots(f"attn.{name}", "hidden", "hidden", False)
        slots |= linear_slots("mlp.key", "ffn", "hidden", False)
        slots |= linear_slots("mlp.value", "hidden", "ffn", False)
        return slots | linear_slots("mlp.receptance", "hidden", "hidden", False)

    def torch_reader(self, model: Model, weights: Weights, layer: int, positions: Positions) -> Layer:
        """The layer of the torch decoder."""
        from .v5_mix import build_layer

        return build_layer(self, model.dims, weights, layer)

    def onnx_emitter(
        self, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
    ) -> None:
        """The layer in a graph."""
        from .v5_graph import emit_layer

        emit_layer(self, context, weights, layer, stream)


@dataclass(frozen=True)
class Finch(Eagle):
    """One layer of RWKV-6 (the same paper): the mix with the token before, and the decay, follow from the token."""

    mixed: ClassVar[tuple[str, ...]] = ("w", "k", "v", "r", "g")
    decays: ClassVar[tuple[str, ...]] = ("1", "1", "hidden")
    is_by_token: ClassVar[bool] = True

    def slots(self) -> dict[str, SlotShape]:
        shapes = {"mix_x": ("1", "1", "hidden"), "mix_down": ("hidden", "5*mix_rank"),
                  "mix_up": ("5", "mix_rank", "hidden"), "decay_down": ("hidden", "w_rank"),
                  "decay_up": ("w_rank", "hidden")}  # fmt: skip
        return super().slots() | {f"attn.{name}": SlotShape(shape, "parameter") for name, shape in shapes.items()}
