"""A decoder over many sequences, one block at a time: the hidden states of all of them are carried from block to block.

Whoever looks on sees the inputs of each linear layer, [tokens, in], and may give it another weight once it has seen all
of them; the layers after it in the same block, and the blocks after it, then get what the new weight makes of them. In
memory are one block and the hidden states. Where the decoder is on another device, hidden states stay in memory, and
those of the sequences that are computed at a time go there.

Where the float model is carried along, its hidden states pass first, some sequences at a time, and the inputs of all of
its layers are kept, in bfloat16.

Sequences go through a block in chunks. A linear layer that gets a new weight is complete only when every chunk has
reached it: the chunks before the last stop there, and start again later, with the weights that are settled by then. A
dense model whose activations fit into one chunk passes through each block once.

The experts of a layer are seen beside each other, as many as `EXPERTS_NBYTES` hold second moments of: every chunk
passes once for what they take, and once for what their last products take. They are complete when all chunks have
passed, those of no token, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from itertools import cycle
from typing import NamedTuple, Protocol

from llmkit.architecture.hooks import Layer, Weights
from llmkit.architecture.model import Model
from llmkit.architecture.slots import is_of_expert
from llmkit.decoder.kv import KVCache
from llmkit.decoder.language_model import require_in_vocabulary
from llmkit.decoder.linear import Linear
from llmkit.decoder.model import Decoder
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch
from llmkit.tensors.device import CPU
from llmkit.tensors.products import product_in_pieces
from llmkit.tensors.stopped import raise_if_stopped

CHUNK_NBYTES = 2**31
EXPERTS_NBYTES = 2**30
_PIECE_NBYTES = 2**26  # of activations: so few that memory is used again, and caches hold it

_EXPERT = re.compile(r"\.experts\.(?:(\d+)\.)?")

Inputs = dict[tuple[str, ...], "torch.Tensor"]
"""The inputs of each linear layer, [B, S, in] in bfloat16, by its weights."""


def require_single_blocks(model: Model, label: str) -> None:
    """Refuse a model of which no block can be computed alone.

    Raises:
        RequirementError: a block takes more of those before it than what comes out of the last.
    """
    if needed := next((block.needs_layers_before for block in model.blocks if block.needs_layers_before), ""):
        raise RequirementError(
            f"{label}: its layers cannot be computed one by one, as all take {needed}",
            hint="quantize without a text: --calibration none",
        )


class BlockHook(Protocol):
    """Sees the linear layers of one block. Layers of one product (q, k and v) share their inputs and come together."""

    def see(self, weights: Sequence[str], x: torch.Tensor, float_x: torch.Tensor | None) -> None:
        """Inputs x [tokens, in] of the layers with these weights (`layers.3.attn.q.weight`).

        Args:
            float_x: the same inputs in the float model, where its hidden states are carried along.
        """

    def settle(self, weights: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        """All of their inputs were seen (none, of an expert that no token reached): what to compute with from now on,
        in place of `values`.

        Both are the weights one below the other, [sum of out, in], in the compute dtype.
        """


class Blocks:
    """The blocks of a decoder, and the sequences that pass through them.

    Args:
        decoder: loaded as `streamed`: its layers are made here.
        weights: of the decoder.
        ids: [B, S] tokens, no padding.
        chunk_nbytes: memory for the activations of the sequences that are computed at a time.
        experts_nbytes: for the second moments of the experts that are seen beside each other.

    Raises:
        RequirementError: as of `require_single_blocks`.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        ids: torch.Tensor,
        chunk_nbytes: int = CHUNK_NBYTES,
        experts_nbytes: int = EXPERTS_NBYTES,
    ) -> None:
        require_single_blocks(decoder.model, "the model")
        self._decoder, self.weights, self.ids, self._experts_nbytes = decoder, weights, ids, experts_nbytes
        dims = decoder.model.dims
        per_sequence = 4 * ids.shape[1] * (5 * dims.hidden + 3 * max(dims.ffn, dims.hidden))
        self._n_rows = max(chunk_nbytes // per_sequence, 1)
        self._n_rows_of_piece = max(_PIECE_NBYTES // per_sequence, 1)

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self._decoder.device

    def __len__(self) -> int:
        return len(self._decoder.model.blocks)

    def with_weights(self, weights: Weights) -> Blocks:
        """The same sequences through blocks made of other weights."""
        blocks = copy(self)
        blocks.weights = weights
        return blocks

    def of(self, ids: torch.Tensor) -> Blocks:
        """The same blocks for other sequences of the same length, [B, S]."""
        blocks = copy(self)
        blocks.ids = ids
        return blocks

    def embedded(self) -> torch.Tensor:
        """The hidden states before the first block, [B, S, hidden].

        Raises:
            InputError: ids outside the vocabulary.
        """
        with torch.inference_mode():
            ids = self.ids.to(self.device)
            require_in_vocabulary(ids, self._decoder.model.dims.vocab)
            return self._decoder.embed(ids, KVCache(keep=False).begin(ids, None)).to(CPU)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head takes, from the hidden states after the last block; both [B, S, hidden]."""
        with torch.inference_mode():
            return self._decoder.final_norm(hidden.to(self.device)).to(CPU)

    def recorded(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
        """The hidden states after a block, in the place of those before it, and the inputs of its linear layers.

        Hidden states are [B, S, hidden] in the compute dtype.
        """
        record = _Record(len(hidden))
        with torch.inference_mode():
            layer = self._decoder.layer(Watched(self.weights, record), index)
            for start in range(0, len(hidden), self._n_rows_of_piece):
                record.rows = slice(start, min(start + self._n_rows_of_piece, len(hidden)))
                hidden[record.rows] = self._through(layer, index, hidden, record.rows)
            return hidden, record.inputs

    def run(
        self, index: int, hidden: torch.Tensor, hook: BlockHook, float_inputs: Inputs | None = None
    ) -> torch.Tensor:
        """The hidden states after a block, in the place of those before it, [B, S, hidden] in the compute dtype.

        Args:
            float_inputs: what `recorded` gave of the hidden states in the float model: the hook sees them, too. Those
                of a layer are taken out once it is settled.
        """
        cuts = [slice(i, i + self._n_rows) for i in range(0, len(hidden), self._n_rows)]
        watch = _Watch(hook, len(cuts), self._experts_nbytes, float_inputs or {})
        with torch.inference_mode():
            layer = self._decoder.layer(Watched(self.weights, watch), index)

            def passed(cut: slice) -> torch.Tensor | None:
                watch.cut, out = cut, None
                with suppress(_NotComplete):
                    out = self._through(layer, index, hidden, cut)
                return None if watch.ends_open() else out

            for last in cycle(cuts):
                if (out := passed(last)) is not None:
                    hidden[last] = out
                    break
            for cut in cuts:
                if cut is not last and (out := passed(cut)) is not None:
                    hidden[cut] = out
            return hidden

    def outputs(self, index: int, hidden: torch.Tensor, weights: Weights, samples: list[int]) -> torch.Tensor:
        """What a block made of other weights gives for some sequences, [samples, S, hidden], on its device.

        It has gradients.

        Args:
            hidden: the inputs of all sequences, [B, S, hidden].
            weights: of a decoder, in the place of its own.
        """
        return self._through(self._decoder.layer(weights, index), index, hidden, samples)

    def _through(self, layer: Layer, index: int, hidden: torch.Tensor, rows: slice | list[int]) -> torch.Tensor:
        device = self.device
        ids, cache = self.ids[rows].to(device), KVCache(keep=False)
        places = cache.begin(ids, None)
        table = self._decoder.tables(ids, places, cache)[self._decoder.position_kind(index)]
        return layer(hidden[rows].to(device), table, cache)


class _NotComplete(Exception):
    """Raised at a linear layer that has not seen all chunks yet."""


class Watching:
    """Looks at the linear layers of a block while it is made and computed; this one changes nothing."""

    def made(self, weights: tuple[str, ...], values: torch.Tensor) -> None:
        """The block has a linear layer of these weights, [out, in] one below the other."""

    def settled(self, weights: tuple[str, ...], values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What to compute the layers of these weights with, [out, in]; their inputs are x [..., in]."""
        return values

    def computed(self, weights: tuple[str, ...], outputs: torch.Tensor) -> None:
        """The layers of these weights gave outputs [..., out], side by side."""


class _Place(NamedTuple):
    """Linear layers that are looked at together: one, or those of a few experts that stand beside each other."""

    name: str
    part: int = 0


class _Watch(Watching):
    """Which linear layers of a block are settled. One pass of a chunk looks at one place that is not: the open one.

    Args:
        float_inputs: as of `Blocks.run`.

    Attributes:
        cut: the chunk that passes.
    """

    def __init__(self, hook: BlockHook, n_chunks: int, experts_nbytes: int, float_inputs: Inputs) -> None:
        self._hook, self._n_chunks, self._experts_nbytes = hook, n_chunks, experts_nbytes
        self._float_inputs, self.cut = float_inputs, slice(0)
        self._layers: dict[_Place, dict[tuple[str, ...], torch.Tensor]] = {}
        self._n_passed: dict[_Place, int] = {}
        self._settled: dict[tuple[str, ...], torch.Tensor] = {}
        self._queues: dict[str, list[_Place]] = {}
        self._open: _Place | None = None

    def made(self, weights: tuple[str, ...], values: torch.Tensor) -> None:
        self._layers.setdefault(self._place(weights, values), {})[weights] = values

    def settled(self, weights: tuple[str, ...], values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What to compute with.

        Raises:
            _NotComplete: it is not known yet.
        """
        is_routed = is_of_expert(weights[0])
        if self._open is None and is_routed:
            # The same for every chunk, whichever experts its tokens reach; of some it may reach none.
            self._open = next(iter(self._queue(weights[0])), None)
        if weights in self._settled:
            return self._settled[weights]
        place = self._place(weights, values)
        self._open = self._open or place
        if place == self._open:
            # Which tokens an expert gets is chosen anew in the quantized model: theirs cannot be told apart.
            floats = None if is_routed else self._float_inputs.get(weights)
            self._hook.see(weights, x.flatten(0, -2), None if floats is None else floats[self.cut].flatten(0, -2))
        if is_routed:
            return values
        if place != self._open or not self._is_complete(place):
            raise _NotComplete
        return self._settled[weights]

    def ends_open(self) -> bool:
        """Whether a place was open in the pass that ends now; experts are complete after the pass of the last chunk."""
        is_open = self._open is not None
        if self._open is not None and is_of_expert(self._open.name):
            self._is_complete(self._open)
        self._open = None
        return is_open

    def _queue(self, weight: str) -> list[_Place]:
        """The places of a layer's experts that are not settled, in their order: first what experts take."""
        stem = _EXPERT.split(weight)[0]
        if stem not in self._queues:
            places = [place for place in self._layers if _EXPERT.split(place.name)[0] == stem != place.name]
            order = list(dict.fromkeys(place.name for place in places))
            self._queues[stem] = sorted(places, key=lambda place: (order.index(place.name), place.part))
        return self._queues[stem]

    def _is_complete(self, place: _Place) -> bool:
        """Count a chunk at the open place; after the last settle that, and close it."""
        self._n_passed[place] = self._n_passed.get(place, 0) + 1
        if self._n_passed[place] < self._n_chunks:
            return False
        for weights, values in self._layers[place].items():
            self._float_inputs.pop(weights, None)
            self._settled[weights] = self._hook.settle(weights, values)
        if is_of_expert(place.name):
            self._queue(place.name).remove(place)
        self._open = None
        return True

    def _place(self, weights: tuple[str, ...], values: torch.Tensor) -> _Place:
        if (expert := _EXPERT.search(weights[0])) is None:
            return _Place(weights[0])
        n_beside = max(1, self._experts_nbytes // (4 * values.shape[1] ** 2))
        return _Place(_EXPERT.sub(".experts.", weights[0]), int(expert[1] or 0) // n_beside)


class _Record(Watching):
    """What the linear layers of a block got; those of experts, whose tokens are not the same, are not kept.

    Args:
        n: sequences.

    Attributes:
        rows: those that pass.
    """

    def __init__(self, n: int) -> None:
        self._n, self.rows = n, slice(0, n)
        self.inputs: dict[tuple[str, ...], torch.Tensor] = {}

    def settled(self, weights: tuple[str, ...], values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not is_of_expert(weights[0]):
            by_sequence = x.reshape(self.rows.stop - self.rows.start, -1, x.shape[-1])  # some get tokens, [B S, in]
            if weights not in self.inputs:
                self.inputs[weights] = torch.empty((self._n, *by_sequence.shape[1:]), dtype=torch.bfloat16, device=CPU)
            self.inputs[weights][self.rows].copy_(by_sequence)
        return values


class Watched:
    """Weights whose linear layers are looked at."""

    def __init__(self, weights: Weights, watch: Watching, stem: str = "") -> None:
        self._weights, self._watch, self._stem = weights, watch, stem

    def __call__(self, leaf: str) -> torch.Tensor:
        raise_if_stopped()
        return self._weights(leaf)

    def has(self, leaf: str) -> bool:
        return self._weights.has(leaf)

    def under(self, stem: str) -> Watched:
        return Watched(self._weights.under(stem), self._watch, f"{self._stem}{stem}.")

    def observed_linear(self, layer: Linear, names: Sequence[str]) -> Linear:
        weights = tuple(f"{self._stem}{name}.weight" for name in names)
        self._watch.made(weights, layer.weight)
        return _WatchedLinear(layer, weights, self._watch)


class _WatchedLinear(Linear):
    def __init__(self, layer: Linear, names: tuple[str, ...], watch: Watching) -> None:
        super().__init__(layer.weight, layer.bias)
        self._names, self._watch = names, watch

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        outputs = product_in_pieces(x, self.weight_for(x), self.bias)
        self._watch.computed(self._names, outputs)
        return outputs

    def weight_for(self, x: torch.Tensor) -> torch.Tensor:
        self.weight = self._watch.settled(self._names, self.weight, x)
        return self.weight
