"""The decoder: blocks wired by their kinds, and the output head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmkit.architecture.altup import AltUpBlock
from llmkit.architecture.hooks import Hooks, Layer, TensorFunction, Weights, reader_of
from llmkit.architecture.kinds import Block, Kind, NoPositions
from llmkit.architecture.layer_inputs import LayerInputBlock
from llmkit.architecture.model import Model
from llmkit.decoder import attention as attentions
from llmkit.decoder import residuals
from llmkit.decoder.altup import build_altup
from llmkit.decoder.attention import build_attention
from llmkit.decoder.embedding import EmbeddingReader
from llmkit.decoder.head import OutputHead
from llmkit.decoder.kv import Cache, KVCache, Places
from llmkit.decoder.language_model import Predictor, token_ids
from llmkit.decoder.layer_inputs import with_layer_inputs
from llmkit.decoder.linear import linear
from llmkit.decoder.mlp import build_mlp
from llmkit.decoder.norms import build_norm
from llmkit.decoder.packed import Packed
from llmkit.decoder.positions import Positions, build_positions, is_counted, limits
from llmkit.decoder.residuals import build_residual
from llmkit.lazy_imports import torch


class Decoder(Predictor):
    """A decoder with its weights; inference only.

    Args:
        weights: by slot; asked for once, or in each pass where layers are `streamed`.
        streamed: one layer in memory at a time, made anew in each pass: for a pass over much by a large model.

    Attributes:
        model: the architecture bound to its config.
        dtype: the compute dtype.
        device: where the weights are.
        final_norm: of the hidden states that the head takes.
    """

    backend = "llmkit"

    def __init__(
        self, model: Model, weights: Weights, dtype: torch.dtype, device: torch.device, *, streamed: bool = False
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device
        self._embed = EmbeddingReader(model.embedding, weights)
        kinds = [getattr(block, "position", NoPositions()) for block in model.blocks]
        self._positions = {kind: build_positions(kind, model.dims, dtype, device) for kind in kinds}

        self._kinds = kinds
        n_layers = len(model.blocks)
        self._layers: Iterable[tuple[Kind, Layer]] = (
            _Streamed(lambda i: (kinds[i], self.layer(weights, i)), n_layers)
            if streamed
            else [(kinds[i], self.layer(weights, i)) for i in range(n_layers)]
        )
        self.final_norm = build_norm(model.final_norm, weights.under("final_norm"))
        self._head = OutputHead(
            model.head,
            self._embed.weight if model.is_tied else weights("head.weight"),
            weights("head.bias") if weights.has("head.bias") else None,
            linear(weights, "head_proj") if weights.has("head_proj.weight") else None,
        )

    @property
    def context(self) -> int | None:
        """The longest sequence it was trained for, in tokens; None when the config does not say."""
        return self.model.dims.context

    @property
    def exact_sharing_limit(self) -> int | None:
        """Sequences longer than this must not share a prefix (dynamic NTK rotates earlier keys anew); or None."""
        return limits(self._positions.values())[0]

    @property
    def recompute_beyond(self) -> int | None:
        """A sequence that grows past this many tokens must be computed anew (longrope's second set); None: never."""
        return limits(self._positions.values())[1]

    def new_cache(self, capacity: int = 0) -> KVCache:
        """An empty cache with room for `capacity` tokens at first; it grows by itself."""
        return KVCache(capacity)

    def hidden(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None = None,
        mask: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The final-normed hidden states [B, S, hidden], or [B, len(rows), hidden].

        Args:
            input_ids: [B, S] token ids.
            cache: past tokens, which these continue; it takes these in.
            mask: [B, past + S], 1 for real tokens and 0 for padding on the left.
            rows: the tokens that are wanted, ascending; None for all. In a `Packed` pass on a CPU the last layer takes
                keys and values of all tokens, and nothing else of those that are not wanted.

        Raises:
            InputError: ids outside the vocabulary, or shapes that do not fit the cache.
        """
        with torch.inference_mode():
            ids = token_ids(input_ids, self.model.dims.vocab, self.device)
            used: Cache = cache if cache is not None else KVCache(keep=False)
            places = used.begin(ids, mask)
            tables = self.tables(ids, places, used)
            x = self.embed(ids, places)
            last = len(self._kinds) - 1
            for i, (kind, layer) in enumerate(self._layers):
                if i == last and rows is not None and self._computes_wanted_rows(used):
                    used.rows = list(rows) or [0]  # what takes no rows is not for every kind
                x = layer(x, tables[kind], used)
                del layer  # a streamed one makes room for the next
            used.end()
            if rows is not None:
                x = x[:, : len(rows)] if used.rows is not None else x[:, list(rows)]
            return self.final_norm(x)

    def _computes_wanted_rows(self, cache: Cache) -> bool:
        block = self.model.blocks[-1]
        is_known = (
            type(block) is Block
            and residuals.computes_wanted_rows(block.residual)
            and attentions.computes_wanted_rows(block.attention)
        )
        return is_known and isinstance(cache, Packed) and self.device.type == "cpu"

    @property
    def continues_segments(self) -> bool:
        """Whether segments of one `Packed` pass may continue each other: layers keep keys and values, and nothing else,
        and positions are counted. It is worth it on a CPU."""
        are_known = all(type(b) is Block and attentions.computes_wanted_rows(b.attention) for b in self.model.blocks)
        return are_known and all(is_counted(kind) for kind in self._kinds) and self.device.type == "cpu"

    def embed(self, ids: torch.Tensor, places: Places) -> torch.Tensor:
        """What the first layer takes, [B, S, hidden], of ids [B, S]."""
        return self._embed(ids, places.positions)

    def tables(self, ids: torch.Tensor, places: Places, cache: Cache) -> dict[Kind, Any]:
        """What each position kind of the model gives the layers for one pass over ids [B, S]."""
        return {kind: p.table(ids, places, cache) for kind, p in self._positions.items()}

    def position_kind(self, index: int) -> Kind:
        """The position kind of a layer: the key of its table."""
        return self._kinds[index]

    def layer(self, weights: Weights, index: int) -> Layer:
        """One layer, made of `weights`: (x [B, S, hidden], its table, cache) -> x."""
        positions = self._positions[self._kinds[index]]
        return _build_layer(self.model.blocks[index], self.model, weights.under(f"layers.{index}"), index, positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of final-normed hidden states [..., hidden]: float32 whatever the compute dtype."""
        with torch.inference_mode():
            return self._head(hidden)


class _Streamed:
    """Layers that are built when they are reached and freed afterwards."""

    def __init__(self, make: Callable[[int], tuple[Kind, Layer]], n: int) -> None:
        self._make, self._n = make, n

    def __iter__(self) -> Iterator[tuple[Kind, Layer]]:
        return (self._make(i) for i in range(self._n))


def _build_layer(block: Kind, model: Model, weights: Weights, index: int, positions: Positions) -> Layer:
    return reader_of(block, _BLOCKS)(model, weights, index, positions)


def _attention_block(block: Block, model: Model, weights: Weights, index: int, positions: Positions) -> Layer:
    return build_residual(block.residual, *_parts(block, model, weights, index, positions))


def _parts(
    block: Block, model: Model, weights: Weights, index: int, positions: Positions
) -> tuple[Sequence[TensorFunction], Layer, TensorFunction]:
    """Norms, attention and MLP of a layer."""
    attention = build_attention(block.attention, weights.under("attn"), model.dims, index, positions)
    mlp = build_mlp(block.mlp, weights.under("mlp"))
    if (scale := block.branch_scale) is not None:
        attention, mlp = _scaled(attention, scale), _scaled(mlp, scale)
    return [build_norm(block.norm, weights.under(name)) for name in block.residual.norms], attention, mlp


def _scaled(branch: Callable[..., torch.Tensor], scale: float) -> Callable[..., torch.Tensor]:
    return lambda *given: branch(*given) * scale


def _layer_input_block(
    block: LayerInputBlock, model: Model, weights: Weights, index: int, positions: Positions
) -> Layer:
    return with_layer_inputs(
        block, weights, _attention_block(block, model, weights, index, positions), model.dims.hidden
    )


def _altup_block(block: AltUpBlock, model: Model, weights: Weights, index: int, positions: Positions) -> Layer:
    return build_altup(block, weights, *_parts(block, model, weights, index, positions))


_BLOCKS: Hooks[Layer] = {AltUpBlock: _altup_block, Block: _attention_block, LayerInputBlock: _layer_input_block}
