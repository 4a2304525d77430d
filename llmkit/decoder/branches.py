"""Many sequences that grow token by token from one shared prefix, whose keys and values are held once.

A step of a batch reads the prefix once for all sequences, and sequences that are finished leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.decoder.kv import Heads, Places, of_both
from llmkit.decoder.packed import Packed
from llmkit.decoder.scores import Scores
from llmkit.decoder.sdpa import attend_scored
from llmkit.decoder.states import Recurrence
from llmkit.errors import InputError
from llmkit.lazy_imports import torch


class Branches:
    """The cache of sequences that share what came before packed passes and go on from their segments.

    Tails lie in one batch, padded on the left: all new tokens go to one column.

    Args:
        passes: those that read each sequence's tail, over one prefix (`keep=True`).
        capacity: tokens to make room for after the tails.

    Attributes:
        memory: what kinds remember of past tokens: name -> [B, ...].
    """

    def __init__(self, passes: Sequence[Packed], capacity: int) -> None:
        first = passes[0]
        self.rows: list[int] | None = None
        prefix, lengths = first.prefix, [n for packed in passes for n in packed.lengths]
        self._past = first.past
        self._lengths = torch.tensor(lengths)  # real tokens of each tail
        self._length = max(lengths)  # columns in use
        self._room = self._length + capacity
        self._shared = {i: _widened(prefix.layer(i)) for i in prefix.layers} if prefix is not None else {}
        self._tails = {i: self._laid_out(passes, i) for i in first.layers}
        states = {layer: zip(*(packed.states[layer] for packed in passes), strict=True) for layer in first.states}
        self._states = {layer: tuple(map(torch.cat, parts)) for layer, parts in states.items()}
        self.memory = {name: torch.cat([p.memory[name] for p in passes]) for name in first.memory}
        self._bias = self._padding()

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._lengths)

    def _laid_out(self, passes: Sequence[Packed], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tails, [B, kv_heads, room, head_dim] each."""
        rows = [_widened(packed.kept(layer)) for packed in passes]

        def laid_out(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            batch = parts[0].new_zeros((self.batch, parts[0].shape[1], self._room, parts[0].shape[3]))
            i = 0
            for packed, part in zip(passes, parts, strict=True):
                for start, n in zip(packed.starts, packed.lengths, strict=True):
                    batch[i, :, self._length - n : self._length] = part[0, :, start : start + n]
                    i += 1
            return batch

        keys = laid_out([row[0] for row in rows])
        return keys, keys if rows[0][1] is rows[0][0] else laid_out([row[1] for row in rows])

    def _padding(self) -> torch.Tensor | None:
        """What is added to the scores of the tails' first columns, [B, 1, 1, columns]; None without padding."""
        if not self._tails or int(self._lengths.min()) == self._length:
            return None
        columns = torch.arange(self._room)
        is_padding = columns < (self._length - self._lengths)[:, None]
        device = next(iter(self._tails.values()))[0].device
        return torch.zeros(is_padding.shape).masked_fill_(is_padding, float("-inf"))[:, None, None].to(device)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        index = torch.tensor(rows)
        self._lengths = self._lengths[index]
        cut = self._length - int(self._lengths.max())  # columns that are padding in all that stay
        self._length, self._room = self._length - cut, self._room - cut

        def chosen(held: torch.Tensor) -> torch.Tensor:
            return held[index.to(held.device), :, cut:].contiguous()

        self._tails = {layer: of_both(pair, chosen) for layer, pair in self._tails.items()}
        self._states = {
            layer: tuple(held[index.to(held.device)] for held in state) for layer, state in self._states.items()
        }
        self.memory = {name: held[index.to(held.device)] for name, held in self.memory.items()}
        self._bias = self._padding()

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> Places:
        if tuple(input_ids.shape) != (self.batch, 1) or mask is not None:
            raise InputError(f"a step takes one token of each of {self.batch} sequences, found {list(input_ids.shape)}")
        if self._length >= self._room:
            raise InputError(f"these sequences have room for no more than {self._room} tokens after their prefix")
        positions = (self._lengths + self._past)[:, None].to(input_ids.device)
        return Places(positions, positions + 1, tuple((row, 0, 1) for row in range(self.batch)))

    def attend(self, layer: int, heads: Heads, scores: Scores) -> torch.Tensor:
        q, k, v, of = heads
        layer = layer if of is None else of
        keys, values = self._tails[layer]
        if of is None:
            keys[:, :, self._length] = k[:, :, 0]
            values[:, :, self._length] = v[:, :, 0]
        stop = self._length + 1
        keys, values = keys[:, :, :stop], values[:, :, :stop]
        scores = scores.over(self._past + stop)
        if scores.is_plain:
            return self._plain(layer, q, keys, values, scores.scale)
        return self._scored(layer, q, keys, values, scores)

    def _plain(
        self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        batch, heads, _, width = q.shape
        groups, past = keys.shape[1], self._past
        folded = (q * scale).to(keys.dtype).view(batch, groups, -1, width)  # the queries of one key head
        each = folded.shape[2]
        weights = torch.empty(batch, groups, each, past + keys.shape[2], dtype=keys.dtype, device=q.device)
        if past:  # one product for all sequences: [groups, B * each, width] by [groups, width, past]
            old_keys, old_values = (t[0] for t in self._shared[layer])
            together = folded.transpose(0, 1).reshape(groups, -1, width)
            old = torch.bmm(together, old_keys.transpose(1, 2))
            weights[..., :past] = old.view(groups, batch, each, past).transpose(0, 1)
        own = torch.matmul(folded, keys.transpose(2, 3))
        weights[..., past:] = own if self._bias is None else own + self._bias[..., : keys.shape[2]].to(own.dtype)
        shares = torch.softmax(weights, -1, dtype=torch.float32).to(keys.dtype)
        out = torch.matmul(shares[..., past:], values)
        if past:
            together = shares[..., :past].transpose(0, 1).reshape(groups, -1, past)
            out = out + torch.bmm(together, old_values).view(groups, batch, each, width).transpose(0, 1)
        return out.reshape(batch, heads, 1, width).to(q.dtype)

    def _scored(
        self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        batch, stop = self.batch, keys.shape[2]
        pad = (self._length - self._lengths)[:, None]
        columns = torch.arange(stop) - pad
        positions = torch.cat([torch.arange(self._past).expand(batch, -1), columns.clamp_min(0) + self._past], 1)
        real = torch.cat([torch.ones(batch, self._past, dtype=torch.bool), columns >= 0], 1)
        if self._past:
            old = [t.expand(batch, -1, -1, -1) for t in self._shared[layer]]
            keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
        return attend_scored(q, keys, values, scores, positions.to(q.device), real.to(q.device))

    def recur(self, layer: int, run: Recurrence, x: torch.Tensor) -> torch.Tensor:
        out, self._states[layer] = run(x, self._states.get(layer), None)
        return out

    def end(self) -> None:
        self._length += 1
        self._lengths = self._lengths + 1


def _widened(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as the products take them: float32 on a CPU, cast once and not in each step."""
    return of_both(pair, lambda held: held.float()) if pair[0].device.type == "cpu" else pair
