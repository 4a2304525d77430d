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
                growth: torch.Tensor = 1 + beta * torch.log1p(torch.floor((places.positions + first) / length))
                return growth[:, :, None, None]

            def scaled(self, queries: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
                return (queries * table).to(queries.dtype)

        return Growing()

    def onnx_emitter(self) -> GraphPositions:
        """The positions of a graph."""
        from llmkit.onnx.positions import GraphPositions, in_compute_dtype

        kind = self

        class Growing(GraphPositions):
            def scaled(self, context: Any, queries: Any) -> Any:
                def growth() -> Any:
                    g = context.graph
                    at = g.op("Add", g.cast(context.positions, "FLOAT"), g.number(float(kind.first)))
                    steps = g.op("Floor", g.op("Div", at, g.number(as_float(kind.length))))
                    logs = g.op("Log", g.op("Add", steps, g.number(1.0)))
                    value = g.op("Add", g.op("Mul", logs, g.number(as_float(kind.beta))), g.number(1.0))
                    return in_compute_dtype(context, g.op("Unsqueeze", value, g.ints(2)))

                return context.graph.op("Mul", queries, context.once(("growth", kind), growth))

        return Growing()
