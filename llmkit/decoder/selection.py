"""Which keys an indexer lets a query see: those with the highest scores, the same for all heads."""

from __future__ import annotations

from llmkit.lazy_imports import torch


class Selection:
    """The choice of one layer for the new tokens of one pass; it is made in blocks of queries, when they are computed.

    Args:
        queries: [B, S, H, D], scaled.
        weights: [B, S, H] float32, of the heads.
        top_k: how many keys a query sees.
        keep: what is chosen is kept, for layers that see the same.
    """

    def __init__(self, queries: torch.Tensor, weights: torch.Tensor, top_k: int, *, keep: bool = False) -> None:
        self._queries, self._weights, self.top_k, self._keep = queries, weights, top_k, keep
        self._chosen: dict[int, torch.Tensor] = {}
        self._parts: dict[int, Selection] = {}

    def of(self, cut: slice) -> Selection:
        """The choice for some of the new tokens; the same object for the same ones."""
        if cut.start not in self._parts:
            queries, weights = self._queries[:, cut], self._weights[:, cut]
            self._parts[cut.start] = Selection(queries, weights, self.top_k, keep=self._keep)
        return self._parts[cut.start]

    def among(self, seen: torch.Tensor, keys: torch.Tensor, start: int) -> torch.Tensor:
        """What queries see of the keys that they could.

        Args:
            seen: [B, rows, T] bool, what they could see: the new tokens from `start` on.
            keys: [B, K, W, T], whose last D rows of the first head are the indexer's keys.
        """
        chosen = self._chosen.get(start)
        if chosen is None:
            queries = self._queries[:, start : start + seen.shape[1]].float()  # [B, rows, H, D]
            products = (queries @ keys[:, :1, -queries.shape[-1] :]).relu_()  # [B, rows, H, T]
            weights = self._weights[:, start : start + seen.shape[1], None]
            scores = (weights @ products)[:, :, 0].masked_fill(~seen, float("-inf"))
            chosen = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
            if self._keep:
                self._chosen[start] = chosen
        return seen & torch.zeros_like(seen).scatter_(-1, chosen, True)
