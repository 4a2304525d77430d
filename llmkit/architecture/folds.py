"""Scales on the inputs of linear layers that what comes before takes off again: x W^T = (x / s) (W s)^T.

A norm takes them off by its weight and bias, a linear layer by its rows and bias; the model stays the same function. It
is the wiring of the kinds that tells where this holds: all that reads x must be known, and multiply by a matrix.

    norm -> q, k, v      norm -> gate, up      norm -> both, where a parallel block shares one
    up -> down           of a gated MLP; of a plain one where its activation f has f(x / s) = f(x) / s for s > 0
    v -> o               a key/value head's channel has one scale in all query heads that share it
    norm -> q_b, norm -> k_b, v_b and v_b -> o     of latent attention

A kind that is not listed here (a plugin's own) passes nothing on, and its layers get no scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.deltanet import GatedDeltaNet
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import (
    Block,
    GatedMLP,
    LayerNorm,
    Parallel,
    PlainMLP,
    PreNorm,
    RMSNorm,
    Sandwich,
    SharedParallel,
)
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.mamba import MixerOnly, ParallelHybrid, SelectiveScan, ShortConvolution, StateSpaceDuality
from llmkit.architecture.model import Model
from llmkit.lazy_imports import torch

_READERS: Mapping[type[Kind], tuple[str, ...]] = {
    GatedDeltaNet: ("in_q", "in_k", "in_v", "in_b", "in_a", "in_z"),
    GroupedQuery: ("q", "k", "v", "gate"),
    GatedMLP: ("gate", "up"),
    PlainMLP: ("up",),
    SelectiveScan: ("in",),
    ShortConvolution: ("in",),
    StateSpaceDuality: ("in",),
}
"""The layers of a kind that read what it is given, those among them that it has."""
_ONE_EACH = {"attn_norm": ("attn",), "mlp_norm": ("mlp",)}
_READ_BY: Mapping[type[Kind], Mapping[str, tuple[str, ...]]] = {
    PreNorm: _ONE_EACH,
    Parallel: _ONE_EACH,
    Sandwich: _ONE_EACH,
    MixerOnly: {"attn_norm": ("attn",)},
    SharedParallel: {"attn_norm": ("attn", "mlp")},
}
"""Norms of a residual kind that nothing but attention and MLP read."""
_HOMOGENEOUS = ("leaky_relu", "linear", "relu")


@dataclass(frozen=True, slots=True)
class Fold:
    """Linear layers of one input, and what makes it.

    Attributes:
        source: the stem of the norm or linear layer (`layers.3.attn_norm`, `layers.3.mlp.up`).
        readers: the stems of the linear layers that read it (`layers.3.attn.q`), all there are.
        norm: the kind of a source that is a norm; None for a linear layer.
        width: outputs of the source that are repeated together.
        repeats: how often, one after the other, before the next `width` (1: inputs are outputs).
    """

    source: str
    readers: tuple[str, ...]
    norm: Kind | None = None
    width: int = 1
    repeats: int = 1

    def source_of(self, n_in: int) -> torch.Tensor:
        """Which output of the source makes each input, int64 [in]."""
        outputs = torch.arange(n_in // self.repeats).view(-1, 1, self.width)
        return outputs.expand(-1, self.repeats, -1).flatten()

    @property
    def source_leaves(self) -> tuple[str, str]:
        """Ids of the source's weight and of its bias, which may not be there."""
        return f"{self.source}.weight", f"{self.source}.bias"

    @property
    def weights(self) -> tuple[str, ...]:
        """Ids of the readers' weights."""
        return tuple(f"{reader}.weight" for reader in self.readers)


def folds(model: Model, layer: int) -> list[Fold]:
    """Every fold of one layer; none for a layer that is no attention block."""
    block = model.blocks[layer]
    return list(_of_block(block, model, f"layers.{layer}.")) if isinstance(block, Block) else []


def _of_block(block: Block, model: Model, stem: str) -> Iterator[Fold]:
    kinds = {"attn": block.attention, "mlp": block.mlp}
    read = {part: tuple(f"{stem}{part}.{name}" for name in _readers(kind)) for part, kind in kinds.items()}
    if type(block.norm) in (RMSNorm, LayerNorm) and block.norm.slots():
        for norm, parts in _READ_BY.get(type(block.residual), {}).items():
            if all(read[part] for part in parts):
                yield Fold(stem + norm, tuple(name for part in parts for name in read[part]), block.norm)
    if type(block.attention) is GroupedQuery and block.attention.limit is None:
        size, kv_heads = block.attention.head_sizes(model.dims)
        yield Fold(f"{stem}attn.v", (f"{stem}attn.o",), None, size, model.dims.heads // kv_heads)
    if type(block.attention) is LatentAttention:
        yield from _of_latent(block.attention, model, f"{stem}attn.")
    if type(block.mlp) is GatedMLP or (type(block.mlp) is PlainMLP and block.mlp.act in _HOMOGENEOUS):
        yield Fold(f"{stem}mlp.up", (f"{stem}mlp.down",))


def _readers(kind: Kind) -> tuple[str, ...]:
    if type(kind) is ParallelHybrid:
        recurrence = tuple(f"ssm.{name}" for name in _readers(kind.recurrence))
        return recurrence and (*_readers(kind.attention), *recurrence)
    if type(kind) is LatentAttention:
        return kind.readers
    slots = kind.slots() if type(kind) in _READERS else {}
    return tuple(name for name in _READERS.get(type(kind), ()) if f"{name}.weight" in slots)


def _of_latent(kind: LatentAttention, model: Model, stem: str) -> Iterator[Fold]:
    if kind.compresses_queries:
        yield Fold(f"{stem}q_a_norm", (f"{stem}q_b",), kind.norm("q_rank"))
    yield Fold(f"{stem}kv_a_norm", (f"{stem}k_b", f"{stem}v_b"), kind.norm("kv_rank"))
    yield Fold(f"{stem}v_b", (f"{stem}o",), None, model.dims.extra["v_width"])
