"""Rotary positions of Qwen 1: a base that follows the length of the prompt, and queries that grow with their place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.architecture.keys import Flag, as_bool
from llmkit.architecture.kinds import Rope
from llmkit.architecture.scaling import NoScaling
from llmkit.lazy_imports import np, torch

if TYPE_CHECKING:
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.kv import Cache, Places
    from llmkit.decoder.positions import Positions
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.graph import Value
    from llmkit.onnx.positions import GraphPositions

_ALPHA = "ntk_alpha"


@dataclass(frozen=True)
class LongRope(Rope):
    """Rotary positions whose base is theta * alpha^(R / (R - 2)) with the alpha of the prompt, and scaled queries.

    Attributes:
        trained: the length in tokens up to which nothing changes.
        grows: alpha = 2^ceil(log2(length / trained) + 1) - 1 for a longer prompt.
        scales_queries: the query at position p is multiplied by log(p + 1) / log(trained), if that is above 1.
    """

    trained: Any = 0
    grows: Flag = False
    scales_queries: Flag = False

    def alpha(self, length: int) -> int:
        """The factor of a prompt of `length` tokens."""
        if length <= self.trained or not as_bool(self.grows):
            return 1
        return int(2 ** math.ceil(math.log(length / self.trained, 2) + 1) - 1)

    def torch_reader(self, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
        return _reader(self, dims, dtype, device)

    def onnx_emitter(self) -> GraphPositions:
        return _emitter(self)

    def onnx_feeds(self, ids: list[int]) -> dict[str, int]:
        """The input of a graph that depends on a prompt."""
        return {_ALPHA: self.alpha(len(ids))} if as_bool(self.grows) else {}


def _reader(kind: LongRope, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
    from llmkit.decoder.positions import Rotary, frequencies

    class Reader(Rotary):
        exact_sharing_limit = kind.trained if as_bool(kind.grows) else None

        def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> Any:
            cos, sin = super().table(input_ids, places, cache)
            scale = _query_scale(kind, places.positions).to(dtype)[..., None, None]
            if not as_bool(kind.grows):
                return cos, sin, scale
            if _ALPHA not in cache.memory:
                alphas = [kind.alpha(int(places.totals[row, start])) for row, start, _ in places.spans]
                cache.memory[_ALPHA] = torch.tensor(alphas, device=device)
            for alpha, (row, start, stop) in zip(cache.memory[_ALPHA].tolist(), places.spans, strict=True):
                if alpha > 1:
                    base = self._theta * alpha ** (self._dim / (self._dim - 2))
                    inverse = frequencies(base, self._dim, NoScaling())[0].to(device)
                    angles = places.positions[row, start:stop, None].float() * inverse
                    cos[row, start:stop, 0], sin[row, start:stop, 0] = angles.cos().to(dtype), angles.sin().to(dtype)
            return cos, sin, scale

        def scaled(self, queries: torch.Tensor, table: Any) -> torch.Tensor:
            return queries * table[2] if as_bool(kind.scales_queries) else queries

    return Reader(kind, dims, dtype, device)


def _query_scale(kind: LongRope, positions: torch.Tensor) -> torch.Tensor:
    """[B, S] positions -> what queries there are multiplied by, at least 1."""
    return ((positions + 1).double().log() / math.log(kind.trained)).clamp_min(1.0)


def _emitter(kind: LongRope) -> GraphPositions:
    from llmkit.onnx.positions import Rotary, in_compute_dtype

    class Emitter(Rotary):
        def _frequencies(self, context: GraphContext) -> tuple[Any, float]:
            if not as_bool(kind.grows):
                return super()._frequencies(context)
            g, dim = context.graph, kind.rotated(context.model.dims.head_dim)
            alpha = g.cast(g.input(_ALPHA, "INT64", ["batch_size"]), "FLOAT")
            base = g.op("Mul", g.op("Pow", alpha, g.number(dim / (dim - 2))), g.number(kind.base))
            exponents = g.constant(-np.arange(0, dim, 2, dtype=np.float32) / dim)
            return g.op("Pow", g.op("Unsqueeze", base, g.ints(1, 2)), exponents), 1.0

        def scaled(self, context: GraphContext, queries: Value) -> Value:
            if not as_bool(kind.scales_queries):
                return queries
            scale = context.once(("logn", kind), lambda: self._scale(context))
            scaled: Value = context.graph.op("Mul", queries, scale)
            return scaled

        def _scale(self, context: GraphContext) -> Any:
            g = context.graph
            places = g.cast(g.op("Add", context.positions, g.ints(1)), "FLOAT")
            scale = g.op("Max", g.op("Div", g.op("Log", places), g.number(math.log(kind.trained))), g.number(1.0))
            return in_compute_dtype(context, g.op("Unsqueeze", scale, g.ints(2)))

    return Emitter(kind)
