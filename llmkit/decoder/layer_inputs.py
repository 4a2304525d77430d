"""The torch readers of per-layer embeddings and shared keys: `llmkit/architecture/layer_inputs.py` has the columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.altup import AltUpInputs
from llmkit.architecture.hooks import Hooks, Layer, Weights, reader_of
from llmkit.architecture.kinds import Kind, NoNorm
from llmkit.architecture.layer_inputs import InputGate, LayerInputBlock, LayerInputs, NormedValues, SharedKeys
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.gated import activation
from llmkit.decoder.kv import Cache, Heads
from llmkit.decoder.linear import fused_linear, linear
from llmkit.decoder.norms import as_long, build_norm
from llmkit.decoder.positions import Positions
from llmkit.decoder.scores import Scores
from llmkit.lazy_imports import torch


@dataclass(slots=True)
class SideColumns:
    """The position table of an attention layer inside a `LayerInputBlock`, with the columns beside the hidden states.

    Attributes:
        table: of the positions.
        columns: [B, S, …], replaced when a layer writes its keys and values.
    """

    table: Any
    columns: torch.Tensor

    def write_kv(self, at: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write keys and values [B, kv_heads, S, head_dim] into the columns from `at` on."""
        shared = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], -1)
        rest = self.columns[..., at + shared.shape[-1] :]
        self.columns = torch.cat([self.columns[..., :at], shared, rest], -1)

    def read_kv(self, at: int, n_heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read keys and values [B, n_heads, S, size] from the columns from `at` on."""
        shared = self.columns[..., at : at + 2 * n_heads * size]
        k, v = (x.unflatten(-1, (n_heads, size)).transpose(1, 2) for x in shared.chunk(2, -1))
        return k, v


def input_columns(kind: Kind, weights: Weights) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function (ids [B, S], x [B, S, hidden]) -> x with the columns beside it, [B, S, hidden + …].

    Raises:
        RequirementError: no torch reader for the kind.
    """
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = reader_of(kind, _BESIDE)(weights)
    return function


def _inputs(kind: LayerInputs, weights: Weights) -> Any:
    from torch.nn.functional import embedding, pad

    if not kind.width:
        return lambda ids, x: pad(x, (0, kind.room))
    table, project = weights("table.weight"), linear(weights, "project")
    norm, shape = build_norm(kind.norm, weights.under("norm")), (kind.layers, kind.width)
    # Rounded to the compute dtype first, as that of the embedding.
    scale = float(torch.tensor(kind.width**0.5, dtype=table.dtype))

    def with_layer_inputs(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = embedding(ids.where(ids < kind.rows, 0), table) * scale
        projected = norm((project(x) * x.shape[-1] ** -0.5).unflatten(-1, shape)).flatten(-2)
        return pad(torch.cat([x, (projected + rows) * 2.0**-0.5], -1), (0, kind.room))

    return with_layer_inputs


class _Attention:
    """Attention with its own keys and values, or with those of an earlier layer."""

    def __init__(
        self, kind: NormedValues | SharedKeys, weights: Weights, dims: Sizes, layer: int, positions: Positions
    ) -> None:
        self._kind, self._layer, self._positions, self._n_q = kind, layer, positions, dims.heads
        self._size, self._n_kv = kind.head_sizes(dims)
        names = ["q", "k", "v"] if isinstance(kind, NormedValues) else ["q"]
        self._inputs = fused_linear(weights, names if "v.weight" in kind.slots() else names[:2])
        self._out = linear(weights, "o")
        rule = kind.score_rule(self._size)
        self._scores = Scores(rule.scale, rule.softcap, rule.window, chunk=rule.chunk)
        q, k = kind.norms or (NoNorm(), NoNorm())
        self._q_norm = build_norm(q, weights.under("q_norm"))
        if isinstance(kind, NormedValues):
            self._k_norm = build_norm(k, weights.under("k_norm"))
            self._v_norm = build_norm(kind.v_norm, weights.under("v_norm"))

    def __call__(self, x: torch.Tensor, given: Any, cache: Cache) -> torch.Tensor:
        table = given.table if isinstance(given, SideColumns) else given
        heads = self._inputs(x).unflatten(-1, (-1, self._size))
        q = self._rotated(self._q_norm(heads[:, :, : self._n_q]), table)
        scores = self._positions.score(self._scores, table)
        if isinstance(self._kind, SharedKeys):
            k, v = given.read_kv(self._kind.at, self._n_kv, self._size)
            attended = cache.attend(self._layer, Heads(q, k, v, self._kind.source), scores)
        else:
            keys, values = heads[:, :, self._n_q :][:, :, : self._n_kv], heads[:, :, -self._n_kv :]
            k, v = self._rotated(self._k_norm(keys), table), self._v_norm(values).transpose(1, 2)
            if self._kind.shared_kv_at is not None:
                given.write_kv(self._kind.shared_kv_at, k, v)
            attended = cache.attend(self._layer, Heads(q, k, v), scores)
        return self._out(attended.transpose(1, 2).flatten(2))

    def _rotated(self, heads: torch.Tensor, table: Any) -> torch.Tensor:
        """[B, S, n, head_dim] -> [B, n, S, head_dim] with positions."""
        return self._positions.rotate(heads, table).transpose(1, 2)


def with_layer_inputs(block: LayerInputBlock, weights: Weights, layer: Layer, hidden: int) -> Layer:
    """A layer on hidden states and the columns beside them, made of one on hidden states."""
    gate = reader_of(block.gate, _GATES)(weights.under("input"))
    scalar = weights("input.scalar") if block.scaled else None

    def carried_on(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        side = SideColumns(table, x[..., hidden:])
        x = layer(x[..., :hidden], side, cache)
        if gate is not None:
            x = x + gate(x, side.columns)
        x = x if scalar is None else x * scalar
        return torch.cat([x, side.columns], -1) if side.columns.shape[-1] else x

    return carried_on


def input_gate(kind: InputGate, weights: Weights) -> Any:
    """The function (x [B, S, hidden], columns) -> what is added, [B, S, hidden]."""
    gate, out, norm = linear(weights, "gate"), linear(weights, "out"), build_norm(kind.norm, weights.under("norm"))
    act = activation(str(kind.act))
    own = slice(kind.at, kind.at + kind.width)
    return lambda x, columns: norm(out(act(gate(x)) * columns[..., own]))


def _streams(kind: AltUpInputs, weights: Weights) -> Any:
    inputs = _inputs(kind, weights)
    others = [linear(weights, f"stream.{i}") for i in range(1, kind.streams)]

    def with_layer_inputs(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        whole = inputs(ids, x)
        return torch.cat([x, *(as_long(project(x), x) for project in others), whole[..., x.shape[-1] :]], -1)

    return with_layer_inputs


_BESIDE: Hooks[Any] = {AltUpInputs: _streams, LayerInputs: _inputs, NoNorm: lambda kind, weights: lambda ids, x: x}
_GATES: Hooks[Any] = {InputGate: input_gate, NoNorm: lambda kind, weights: None}
ATTENTION: Hooks[Layer] = {NormedValues: _Attention, SharedKeys: _Attention}
