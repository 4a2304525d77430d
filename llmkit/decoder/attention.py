"""The torch reader of the attention kinds: projections and positions; the cache computes the attention itself."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.deltanet import GatedDeltaNet, KimiDeltaAttention
from llmkit.architecture.hooks import Hooks, Layer, TensorFunction, Weights, reader_of
from llmkit.architecture.indexer import IndexedAttention
from llmkit.architecture.keys import as_bool
from llmkit.architecture.kinds import GroupedQuery, Kind
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.mamba import ParallelHybrid, SelectiveScan, ShortConvolution, StateSpaceDuality
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.deltanet import gated_delta_net, kimi_delta_attention
from llmkit.decoder.indexer import IndexedReader
from llmkit.decoder.kv import Cache, Heads, select_rows
from llmkit.decoder.latent import LatentReader
from llmkit.decoder.layer_inputs import ATTENTION
from llmkit.decoder.linear import fused_linear, linear
from llmkit.decoder.mamba import duality_layer, selective_scan_layer, short_convolution_layer
from llmkit.decoder.norms import build_norm
from llmkit.decoder.positions import Positions
from llmkit.decoder.scores import Scores
from llmkit.lazy_imports import torch


def build_attention(kind: Kind, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
    """The attention of one layer, with its weights.

    Raises:
        RequirementError: no torch reader for the kind.
    """
    return reader_of(kind, _READERS)(weights, dims, layer, positions)


def computes_wanted_rows(kind: Kind) -> bool:
    """Whether an attention kind gives outputs of the rows that are `select_rows` only."""
    return type(kind) is GroupedQuery


class _GroupedQuery:
    def __init__(self, kind: GroupedQuery, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> None:
        self._inputs = fused_linear(weights, ("q", "k", "v", "gate") if kind.is_gated else ("q", "k", "v"))
        self._out = linear(weights, "o")
        self._dims = dims
        self._layer = layer
        self._positions = positions
        self._size, self._n_kv = kind.head_sizes(dims)
        rule = kind.score_rule(self._size)
        sinks = weights("sinks") if as_bool(kind.sinks) else None
        self._scores = Scores(rule.scale, rule.softcap, rule.window, chunk=rule.chunk, sinks=sinks)
        self._kind = kind
        self._norms: tuple[TensorFunction, TensorFunction] | None = None
        if kind.norms is not None:
            q, k = kind.norms
            self._norms = build_norm(q, weights.under("q_norm")), build_norm(k, weights.under("k_norm"))

    def __call__(self, x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        batch, length, _ = x.shape
        n_q, n_kv = self._dims.heads, self._n_kv
        heads = self._inputs(x).view(batch, length, -1, self._size)
        heads, gate = heads[:, :, : n_q + 2 * n_kv], heads[:, :, n_q + 2 * n_kv :]
        both, v = heads[:, :, : n_q + n_kv], heads[:, :, n_q + n_kv :].transpose(1, 2)
        both = both if self._kind.norms_rotated else self._normed(both)
        if (limit := self._kind.limit) is not None:
            both, v = both.clamp(-limit, limit), v.clamp(-limit, limit)
        both = self._positions.rotate(both, table)
        both = self._normed(both) if self._kind.norms_rotated else both
        q = self._positions.scaled(both[:, :, :n_q], table).transpose(1, 2)
        k = both[:, :, n_q:].transpose(1, 2)
        attended = cache.attend(self._layer, Heads(q, k, v), self._positions.score(self._scores, table))
        attended = attended.transpose(1, 2)
        if self._kind.is_gated:
            attended = attended * select_rows(gate, cache).sigmoid()
        return self._out(attended.flatten(2))

    def _normed(self, both: torch.Tensor) -> torch.Tensor:
        """Heads of queries and keys [B, S, heads + kv_heads, head_dim] normed, if the kind has norms."""
        if self._norms is None:
            return both
        parts = both.split([self._dims.heads, self._n_kv], 2)
        if self._kind.norms_all_heads:
            normed = [norm(part.flatten(2)).view_as(part) for norm, part in zip(self._norms, parts, strict=True)]
        else:
            normed = [norm(part) for norm, part in zip(self._norms, parts, strict=True)]
        return torch.cat(normed, 2)


def _beside(kind: ParallelHybrid, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
    attention = build_attention(kind.attention, weights, dims, layer, positions)
    recurrence = build_attention(kind.recurrence, weights.under("ssm"), dims, layer, positions)
    (a_in, a_out), (r_in, r_out) = kind.attention_factors, kind.recurrence_factors
    return lambda x, table, cache: (
        attention(x * a_in, table, cache) * a_out + recurrence(x * r_in, table, cache) * r_out
    )


_READERS: Hooks[Layer] = {
    **ATTENTION,
    ParallelHybrid: _beside,
    GatedDeltaNet: gated_delta_net,
    GroupedQuery: _GroupedQuery,
    IndexedAttention: IndexedReader,
    KimiDeltaAttention: kimi_delta_attention,
    LatentAttention: LatentReader,
    SelectiveScan: selective_scan_layer,
    ShortConvolution: short_convolution_layer,
    StateSpaceDuality: duality_layer,
}
