"""The torch reader of the residual kinds: how norms, attention and MLP are wired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmkit.architecture.hooks import Hooks, Layer, TensorFunction, reader_of
from llmkit.architecture.kinds import (
    Kind,
    NormedResidual,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    Residual,
    Sandwich,
    SharedParallel,
)
from llmkit.architecture.mamba import MixerOnly
from llmkit.architecture.parallel_experts import OpenSandwich
from llmkit.decoder.kv import Cache, select_rows
from llmkit.lazy_imports import torch


def build_residual(kind: Kind, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
    """The function of one layer: (x [B, S, hidden], positions' table, cache) -> x.

    Args:
        norms: in the order of the kind's `norms`.

    Raises:
        RequirementError: no torch reader for the kind.
    """
    return reader_of(kind, _READERS)(norms, attention, mlp)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _sequential(
    kind: Residual, norms: Sequence[TensorFunction], attention: Layer, mlp: Callable[..., torch.Tensor]
) -> Layer:
    """Norms before attention and MLP, after them, or both; that of the open sandwich is given x besides."""
    named = dict(zip(kind.norms, norms, strict=True))
    attn_norm, attn_post_norm, mlp_norm, mlp_post_norm = (named.get(name, _same) for name in Sandwich.norms)
    is_open = isinstance(kind, OpenSandwich)

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        x = select_rows(x, cache) + attn_post_norm(attention(attn_norm(x), table, cache))
        return x + mlp_post_norm(mlp(mlp_norm(x), x) if is_open else mlp(mlp_norm(x)))

    return layer


def _post_norm(kind: Kind, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
    attn_norm, mlp_norm = norms

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        x = attn_norm(select_rows(x, cache) + attention(x, table, cache))
        return mlp_norm(x + mlp(x))

    return layer


def _normed(kind: NormedResidual, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
    attn_norm, mlp_norm = norms

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        y = attn_norm(x)
        y = mlp_norm(torch.add(attention(y, table, cache), select_rows(y, cache), alpha=kind.alpha))
        return torch.add(mlp(y), y, alpha=kind.alpha)

    return layer


def _mixer_only(kind: Kind, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
    (norm,) = norms
    return lambda x, table, cache: select_rows(x, cache) + attention(norm(x), table, cache)


def _parallel(kind: Kind, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
    attn_norm, mlp_norm = norms

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        attended, x = attention(attn_norm(x), table, cache), select_rows(x, cache)
        return x + attended + mlp(mlp_norm(x))

    return layer


def _shared_parallel(kind: Kind, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
    (norm,) = norms

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        y = norm(x)
        return select_rows(x, cache) + attention(y, table, cache) + mlp(select_rows(y, cache))

    return layer


def computes_wanted_rows(kind: Kind) -> bool:
    """Whether a residual kind goes on with the rows that are `select_rows`."""
    return type(kind) in _READERS


_READERS: Hooks[Layer] = {
    OpenSandwich: _sequential,
    MixerOnly: _mixer_only,
    NormedResidual: _normed,
    PreNorm: _sequential,
    PostNorm: _post_norm,
    OutputNorm: _sequential,
    Parallel: _parallel,
    SharedParallel: _shared_parallel,
    Sandwich: _sequential,
}
