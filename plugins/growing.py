"""Queries that grow with their positions (Llama 4's temperature; Nakanishi 2025, arXiv:2501.19399)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.architecture.keys import Number, as_float
from llmkit.architecture.kinds import NoPositions
from llmkit.architecture.sizes import Sizes
from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    from llmkit.decoder.positions import Positions
    from llmkit.onnx.positions import GraphPositions


def growth_at(positions: torch.Tensor, beta: float, length: float, first: int = 0) -> torch.Tensor:
    """1 + beta ln(1 + floor((p + first) / length)) for each position p [B, S]: [B, S, 1, 1] float32."""
    growth: torch.Tensor = 1 + beta * torch.log1p(torch.floor((positions + first) / length))
    return growth[:, :, None, None]


def grown(context: Any, queries: Any, kind: Any, beta: float, length: float, first: int = 0) -> Any:
    """Queries of a graph times that; computed once for all layers of a `kind` of positions."""
    from llmkit.onnx.positions import in_compute_dtype

    def growth() -> Any:
        g = context.graph
        at = g.cast(context.positions, "FLOAT")
        at = g.op("Add", at, g.number(float(first))) if first else at
        steps = g.op("Floor", g.op("Div", at, g.number(length)))
        logs = g.op("Log", g.op("Add", steps, g.number(1.0)))
        value = g.op("Add", g.op("Mul", logs, g.number(beta)), g.number(1.0))
        return in_compute_dtype(context, g.op("Unsqueeze", value, g.ints(2)))

    return context.graph.op("Mul", queries, context.once(("growth", kind), growth))


@dataclass(frozen=True)
class GrowingQueries(NoPositions):
    """Queries times 1 + beta ln(1 + floor((p + first) / length)) at position p, and no positions else.

    Attributes:
        length: the context that the model was trained for at first, in tokens.
        first: what the first position counts.
    """

    beta: Number
    length: Number
    first: int = 0

    def torch_reader(self, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
        """The positions of the torch decoder."""
        from llmkit.decoder.positions import Positions

        beta, length, first = as_float(self.beta), as_float(self.length), self.first

        class Growing(Positions):
            def table(self, input_ids: Any, places: Any, cache: Any) -> torch.Tensor:
                """What queries are multiplied by, [B, S, 1, 1] float32."""
                return growth_at(places.positions, beta, length, first)

            def scaled(self, queries: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
                return (queries * table).to(queries.dtype)

        return Growing()

    def onnx_emitter(self) -> GraphPositions:
        """The positions of a graph."""
        from llmkit.onnx.positions import GraphPositions

        kind = self

        class Growing(GraphPositions):
            def scaled(self, context: Any, queries: Any) -> Any:
                return grown(context, queries, kind, as_float(kind.beta), as_float(kind.length), kind.first)

        return Growing()
