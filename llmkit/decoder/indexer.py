"""The torch reader of sparse latent attention: the cache holds the indexer's key behind what is compressed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.architecture.hooks import Weights
from llmkit.architecture.indexer import IndexedAttention
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.latent import LatentReader
from llmkit.decoder.linear import linear
from llmkit.decoder.norms import build_norm
from llmkit.decoder.positions import Positions
from llmkit.decoder.scores import Scores
from llmkit.decoder.selection import Selection
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch

_NOTE = "selection"


class IndexedReader(LatentReader):
    """The attention of one layer."""

    def __init__(self, kind: IndexedAttention, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> None:
        super().__init__(kind, weights, dims, layer, positions)
        self._kind = kind
        if kind.shares:
            return
        self._index_q, self._index_k = linear(weights, "index_q"), linear(weights, "index_k")
        self._index_norm = build_norm(kind.index_norm, weights.under("index_k_norm"))
        self._index_weights = linear(weights, "index_weights")
        order = kind.order(dims)
        self._order = None if order is None else torch.tensor(order)

    def _scored(
        self, x: torch.Tensor, compressed: torch.Tensor, q: torch.Tensor, k: torch.Tensor, table: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Scores]:
        """Queries, and keys with the indexer's behind them, and what the queries see."""
        notes = self._positions.notes(table)
        if self._kind.shares:
            if notes is None or _NOTE not in notes:
                raise RequirementError(f"layer {self._layer} sees what a layer before it chose, which was not computed")
            return q, k, replace(self._scores, selection=notes[_NOTE])
        heads, width = (self._dims.extra[name] for name in ("index_heads", "index_dim"))
        queries = self._index_q(compressed).unflatten(-1, (heads, width))
        both = torch.cat([queries, self._index_norm(self._index_k(x))[:, :, None]], 2)
        if self._order is not None:
            both = both[..., self._order.to(both.device)]
        both = self._positions.rotate(both, table)
        weights = self._index_weights(x).float() * (heads * width) ** -0.5
        selection = Selection(both[:, :, :heads], weights, self._kind.n_seen, keep=notes is not None)
        if notes is not None:
            notes[_NOTE] = selection
        q = torch.nn.functional.pad(q, (0, width))
        k = torch.cat([k, both[:, :, heads:].transpose(1, 2)], -1)
        return q, k, replace(self._scores, selection=selection)
