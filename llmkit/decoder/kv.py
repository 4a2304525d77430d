"""Keys and values of past tokens, the attention over them, and the states of recurrences.

The decoder hands queries, keys and values of the new tokens to `attend`, and recurrences to `recur`; a cache decides
how keys are kept, which of them a query sees, and from which state a recurrence goes on. A forward pass is `begin`, an
`attend`, a `recur` or both for each layer, `end`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from llmkit.decoder.scores import Scores
from llmkit.decoder.sdpa import attend_causal, attend_masked, attend_plain, attend_scored
from llmkit.decoder.states import Recurrence, Rows, State
from llmkit.errors import InputError
from llmkit.lazy_imports import torch

Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Keys and values, [B, kv_heads, T, head_dim] each; one tensor where they are the same."""


class Heads(NamedTuple):
    """What attention is given of the new tokens.

    Attributes:
        q: [B, heads, S, head_dim] queries.
        k, v: [B, kv_heads, S, head_dim] keys and values; one tensor (latent attention) is held once.
        of: the layer that these keys and values are of, where that was another one: its past ones are seen, and nothing
            is kept.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    of: int | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where the new tokens of one forward pass stand.

    Attributes:
        positions: [B, S] int64, the position of each token in its own sequence.
        totals: [B, S] int64, the length of that sequence (real tokens) after this pass.
        spans: (row, start, stop) of each sequence's new tokens, padding before and after them left out.
        real: [B, S] bool, False for padding; None where there is none.
    """

    positions: torch.Tensor
    totals: torch.Tensor
    spans: tuple[tuple[int, int, int], ...]
    real: torch.Tensor | None = None

    def tokens(self, input_ids: torch.Tensor) -> list[list[int]]:
        """The new tokens of each sequence in ids [B, S], without padding: `positions` count them."""
        cuts = [(input_ids[row, start:stop], row, slice(start, stop)) for row, start, stop in self.spans]
        if self.real is None:
            return [ids.tolist() for ids, _, _ in cuts]
        return [ids[self.real[row, cut]].tolist() for ids, row, cut in cuts]


class Cache(Protocol):
    """What the decoder needs of a cache."""

    memory: dict[str, torch.Tensor]
    """What kinds remember of past tokens besides keys and values: name -> [B, ...], a row for each sequence."""
    rows: list[int] | None
    """New tokens whose outputs are wanted of the layer that is computed; None for all.

    Set in the last layer, where attention is of a kind that gives what `attend` gave it for its queries; the residual
    kinds go on with these rows (`select_rows`).
    """

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> Places:
        """Start a pass over `input_ids` [B, S]; `mask` [B, past + S] has 1 for real tokens."""

    def attend(self, layer: int, heads: Heads, scores: Scores) -> torch.Tensor:
        """Attention of the new queries over past and new keys, [B, heads, S, head_dim]."""

    def recur(self, layer: int, run: Recurrence, x: torch.Tensor) -> torch.Tensor:
        """A recurrence over the new tokens [B, S, width] of each sequence, from the state that its past left.

        It gives [B, S, width'], never read at padding. One for each layer and pass, in a layer with attention too.
        """

    def end(self) -> None:
        """The pass is over: the new tokens are past ones now."""


class KVCache:
    """Keys and values of a batch of sequences of one length, padded on either side where a mask says so.

    What is padding stays where it is: tokens that follow a right-padded row come after its padding.

    Args:
        capacity: tokens to make room for at first; it grows by itself.
        keep: False computes one pass without keeping anything (plain scoring).
    """

    def __init__(self, capacity: int = 0, *, keep: bool = True) -> None:
        self.length = 0
        self.rows: list[int] | None = None
        self.mask: torch.Tensor | None = None
        self._capacity = capacity
        self._keep = keep
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._new = 0
        self._batch = 0
        self._bias: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self.memory: dict[str, torch.Tensor] = {}
        self._rows = Rows(None)
        self._states: dict[int, State] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold keys and values."""
        return tuple(self._keys)

    @property
    def batch(self) -> int:
        """Number of sequences (0 while empty)."""
        return self._batch

    @property
    def capacity(self) -> int:
        """Tokens to make room for at first."""
        return self._capacity

    def layer(self, layer: int) -> Pair:
        """Keys and values of a layer, [B, kv_heads, length, head_dim] each (views)."""
        return of_both((self._keys[layer], self._values[layer]), lambda held: held[:, :, : self.length])

    def state(self, layer: int) -> State | None:
        """What the recurrence of a layer left."""
        return self._states.get(layer)

    @classmethod
    def of(
        cls,
        pairs: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        states: Mapping[int, State],
        memory: Mapping[str, torch.Tensor],
        length: int,
    ) -> KVCache:
        """A cache of one sequence of `length` tokens: by layer, [1, kv_heads, T, head_dim] pairs and states."""
        cache = cls()
        cache._keys = {layer: keys for layer, (keys, _) in pairs.items()}
        cache._values = {layer: values for layer, (_, values) in pairs.items()}
        cache._states, cache.memory = dict(states), dict(memory)
        cache.length = cache._capacity = length
        cache._batch = 1
        return cache

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> Places:
        batch, new = input_ids.shape
        if self.batch not in (0, batch):
            raise InputError(f"the cache holds {self.batch} sequences, the input {batch}")
        total = self.length + new
        self._new = new
        self.mask = self._whole_mask(mask, batch, new, input_ids.device)
        if self._keep:
            self._batch = batch
        if self.mask is None:
            self._bias, self._rows = None, Rows(None)
            self._positions = torch.arange(total, device=input_ids.device).expand(batch, total)
            positions = self._positions[:, self.length :]
            spans = tuple((row, 0, new) for row in range(batch))
            return Places(positions, torch.full_like(positions, total), spans)
        real = self.mask.cumsum(-1)
        self._positions = (real - 1).clamp_min(0)
        self._bias = _visible(self.mask, self.length, new)
        is_new = self.mask[:, self.length :] != 0
        self._rows = Rows(is_new)
        count = torch.arange(1, new + 1, device=is_new.device)
        stops = (is_new * count).amax(-1)
        starts = torch.minimum(new - (is_new * count.flip(0)).amax(-1), stops)
        spans = tuple((row, *span) for row, span in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)))
        return Places(self._positions[:, self.length :], real[:, -1:].expand(batch, new), spans, is_new)

    def _whole_mask(self, mask: torch.Tensor | None, batch: int, new: int, device: torch.device) -> torch.Tensor | None:
        total = self.length + new
        if mask is None:
            if self.mask is None:
                return None
            ones = torch.ones(batch, new, dtype=self.mask.dtype, device=device)
            return torch.cat([self.mask, ones], dim=1)
        if mask.shape != (batch, total):
            raise InputError(f"the mask has shape {list(mask.shape)}, expected {[batch, total]} (past and new tokens)")
        mask = mask.to(device=device, dtype=torch.int64)
        return mask if self.mask is not None or not bool(mask.all()) else None

    def attend(self, layer: int, heads: Heads, scores: Scores) -> torch.Tensor:
        q, k, v, of = heads
        k, v = self.as_cached(layer if of is None else of, k, v)
        if self._keep and of is not None:
            k, v = (held[of][:, :, : self.length + self._new] for held in (self._keys, self._values))
        elif self._keep:
            k, v = self._append(layer, k, v)
        scores = scores.over(k.shape[2])
        if not scores.is_plain and self._positions is not None:
            real = self.mask != 0 if self.mask is not None else None
            return attend_scored(q, k, v, scores, self._positions, real)
        if self._bias is not None:
            return attend_masked(q, k, v, self._bias, scores.scale)
        if self._new == 1:
            return attend_plain(q, k, v, scores.scale)
        return attend_causal(q, k, v, scores.scale)

    def recur(self, layer: int, run: Recurrence, x: torch.Tensor) -> torch.Tensor:
        out, state = self._rows.run(run, x, self._states.get(layer))
        if self._keep:
            self._states[layer] = state
        return out

    def end(self) -> None:
        if self._keep:
            self.length += self._new
        else:
            self.mask = None

    def as_cached(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """New keys and values [B, heads, S, size] of a layer in the precision of the cache."""
        return k, v

    def _append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        start, stop = self.length, self.length + k.shape[2]
        for held, new in ((self._keys, k), (self._values, v)):
            if held is self._values and v is k:
                held[layer] = self._keys[layer]
                continue
            if layer not in held:
                held[layer] = new.new_empty((*new.shape[:2], max(stop, self._capacity), new.shape[3]))
            elif held[layer].shape[2] < stop:
                held[layer] = _grown(held[layer], start, max(stop, 2 * held[layer].shape[2], self._capacity))
            held[layer][:, :, start:stop] = new
        return self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]


def select_rows(x: torch.Tensor, cache: Cache) -> torch.Tensor:
    """What is wanted of x [B, S, ...]."""
    return x if cache.rows is None else x[:, cache.rows]


def of_both(pair: Pair, function: Callable[[torch.Tensor], torch.Tensor]) -> Pair:
    """Apply a function to keys and values; once if they are the same tensor."""
    keys = function(pair[0])
    return keys, keys if pair[1] is pair[0] else function(pair[1])


def _grown(held: torch.Tensor, length: int, room: int) -> torch.Tensor:
    larger = held.new_empty((*held.shape[:2], room, held.shape[3]))
    larger[:, :, :length] = held[:, :, :length]
    return larger


def _visible(mask: torch.Tensor, past: int, new: int) -> torch.Tensor:
    """[B, 1, S, T] bool: key j is seen by query i when it is real and not later.

    A padding token sees itself, so that its row of the softmax is not empty (its output is never read).
    """
    total = past + new
    causal = torch.ones(new, total, dtype=torch.bool, device=mask.device).tril(past)
    diagonal = torch.zeros_like(causal)
    diagonal[:, past:].fill_diagonal_(True)
    return (causal & (mask != 0)[:, None, :] | diagonal)[:, None]
