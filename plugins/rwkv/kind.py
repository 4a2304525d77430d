"""The kind of RWKV-4's layer: its weights, and where its readers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmkit.architecture.kind import linear_slots, under
from llmkit.architecture.kinds import Kind, NoPositions, SlotShape

__all__ = ["TimeAndChannelMix"]


@dataclass(frozen=True)
class TimeAndChannelMix(Kind):
    """One layer: x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    norm: Kind
    position: Kind = field(default_factory=NoPositions)

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

    @staticmethod
    def torch_reader(kind: TimeAndChannelMix, model: Any, weights: Any, index: int, positions: Any) -> Any:
        """The layer of the torch decoder."""
        from llmkit_plugins.rwkv.mix import build_layer

        return build_layer(kind, weights, index)

    @staticmethod
    def onnx_emitter(
        kind: TimeAndChannelMix, context: Any, weights: Any, layer: int, positions: Any, stream: Any
    ) -> None:
        """The layer in a graph."""
        from llmkit_plugins.rwkv.graph import emit_layer

        emit_layer(kind, context, weights, layer, stream)
