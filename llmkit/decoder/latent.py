"""The torch reader of latent attention: the cache holds what is compressed, and all heads attend to that."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.hooks import Weights
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.kv import Cache, Heads
from llmkit.decoder.linear import fused_linear, linear
from llmkit.decoder.norms import build_norm
from llmkit.decoder.positions import Positions
from llmkit.decoder.scores import Scores
from llmkit.lazy_imports import torch


class LatentReader:
    """The attention of one layer: what expands keys and values is applied to queries and to what was attended."""

    def __init__(self, kind: LatentAttention, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> None:
        self._dims, self._layer, self._positions = dims, layer, positions
        if kind.compresses_queries:
            down, norm = linear(weights, "q_a"), build_norm(kind.norm("q_rank"), weights.under("q_a_norm"))
            self._compress_queries = lambda x: norm(down(x))
            self._queries = linear(weights, "q_b")
        else:
            self._compress_queries = lambda x: x
            self._queries = linear(weights, "q")
        self._compress = linear(weights, "kv_a")
        self._norm = build_norm(kind.norm("kv_rank"), weights.under("kv_a_norm"))
        self._expand = fused_linear(weights, ("k_b", "v_b"))
        self._out = linear(weights, "o")
        self._scores = Scores(kind.score_rule(dims.extra["qk_width"]).scale)

    def __call__(self, x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        batch, length, _ = x.shape
        heads, n_rotated = self._dims.heads, self._dims.head_dim
        rank, nope, value = (self._dims.extra[name] for name in ("kv_rank", "nope", "v_width"))
        compressed = self._compress_queries(x)
        queries = self._queries(compressed).view(batch, length, heads, nope + n_rotated)
        queries = self._positions.scaled(queries, table)
        latent, key = self._compress(x).split([rank, n_rotated], -1)
        latent = self._norm(latent)
        rotated = torch.cat([queries[..., nope:], key[:, :, None]], 2)
        rotated = self._positions.rotate(rotated, table).transpose(1, 2)
        k_b, v_b = self._expand.weight_for(latent).split([heads * nope, heads * value])
        plain = queries[..., :nope].transpose(1, 2) @ k_b.view(heads, nope, rank)
        q = torch.cat([plain, rotated[:, :heads]], -1)
        k = torch.cat([latent[:, None], rotated[:, heads:]], -1)
        q, k, scores = self._scored(x, compressed, q, k, table)
        attended = cache.attend(self._layer, Heads(q, k, k), self._positions.score(scores, table))[..., :rank]
        values = attended @ v_b.view(heads, value, rank).transpose(1, 2)
        return self._out(values.transpose(1, 2).reshape(batch, length, heads * value))

    def _scored(
        self, x: torch.Tensor, compressed: torch.Tensor, q: torch.Tensor, k: torch.Tensor, table: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Scores]:
        """Queries [B, heads, S, width] and keys [B, 1, S, width] as the cache gets them, and how scores are made.

        Args:
            x: [B, S, hidden], what the layer is given.
            compressed: what queries are made of, [B, S, q_rank], or x.
        """
        return q, k, self._scores
