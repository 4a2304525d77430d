"""Many continuations of one prefix in a single forward pass, without padding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from llmkit.decoder.kv import Heads, KVCache, Pair, Places, of_both
from llmkit.decoder.scores import Scores
from llmkit.decoder.sdpa import attend_causal, attend_rows, attend_scored
from llmkit.decoder.states import Recurrence, Segments, State
from llmkit.errors import InputError
from llmkit.lazy_imports import torch


class Packed:
    """Segments that each continue the same prefix, side by side in one row of tokens [1, sum(lengths)].

    Linear layers see all tokens at once; attention is done for each segment over prefix and segment. Positions go on
    from the prefix. It serves one forward pass.

    Args:
        prefix: what all segments continue: one sequence without padding; None for nothing.
        lengths: tokens of each segment.
        parents: the segment of this pass that each continues, -1 for the prefix; those below a segment follow it.
        keep: keep each segment's keys, so that `segment(i)` can be continued in its turn.
        on_layer: called when a layer begins.

    Attributes:
        rows: tokens whose outputs the layers give from now on, ascending; None for all (`Cache`).
        states: what the recurrence of each layer left, a row for each segment (`keep=True`).
    """

    def __init__(
        self,
        prefix: KVCache | None,
        lengths: Sequence[int],
        *,
        parents: Sequence[int] | None = None,
        keep: bool = False,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        if prefix is not None and (prefix.batch > 1 or prefix.mask is not None):
            raise InputError("a shared prefix is one sequence without padding")
        if not lengths or min(lengths) < 1:
            raise InputError("every packed segment needs at least one token")
        if parents is not None and keep:
            raise InputError("segments that continue each other in one pass are not kept")
        self.prefix = prefix if prefix is not None and prefix.length else None
        self.lengths = tuple(lengths)
        self.starts = (0, *accumulate(lengths))[:-1]
        self._before: list[tuple[int, ...]] = []  # the segments that each continues, outermost first
        for parent in parents or [-1] * len(lengths):
            self._before.append((*self._before[parent], parent) if parent >= 0 else ())
        self._above = _above(self._before, [self._cut(i) for i in range(len(lengths))])
        self.keep = keep
        self._on_layer, self._layer = on_layer, -1
        self.rows: list[int] | None = None
        self._pairs: dict[int, Pair] = {}
        self._segments = Segments(self.lengths)
        self.states: dict[int, State] = {}
        past = prefix.memory if self.prefix is not None and prefix is not None else {}
        self.memory = {name: held.expand(len(lengths), *held.shape[1:]) for name, held in past.items()}

    @property
    def past(self) -> int:
        """Tokens of the prefix."""
        return self.prefix.length if self.prefix is not None else 0

    def _cut(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i] + self.lengths[i])

    def _past(self, i: int) -> int:
        """Tokens before segment i."""
        return self.past + sum(self.lengths[above] for above in self._before[i])

    def _seen(self, i: int, k: torch.Tensor, v: torch.Tensor, past: Pair | None) -> Pair | None:
        """Keys and values before segment i."""
        own = [(k[:, :, cut], v[:, :, cut]) for cut in map(self._cut, self._before[i])]
        parts = [*([past] if past is not None else []), *own]
        if len(parts) < 2:
            return parts[0] if parts else None
        dtype = parts[0][0].dtype
        return torch.cat([p[0].to(dtype) for p in parts], 2), torch.cat([p[1].to(dtype) for p in parts], 2)

    @property
    def ends(self) -> tuple[int, ...]:
        """The index of each segment's last token in the row."""
        return tuple(start + n - 1 for start, n in zip(self.starts, self.lengths, strict=True))

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> Places:
        expected = (1, sum(self.lengths))
        if tuple(input_ids.shape) != expected or mask is not None:
            raise InputError(f"packed input has shape {list(input_ids.shape)}, expected {list(expected)} and no mask")
        device = input_ids.device
        lengths = torch.tensor(self.lengths, device=device)
        pasts = [self._past(i) for i in range(len(self.lengths))]
        positions = torch.cat([torch.arange(p, p + n, device=device) for p, n in zip(pasts, self.lengths, strict=True)])
        totals = (lengths + torch.tensor(pasts, device=device)).repeat_interleave(lengths)[None]
        spans = tuple((0, start, start + n) for start, n in zip(self.starts, self.lengths, strict=True))
        return Places(positions[None], totals, spans)

    def attend(self, layer: int, heads: Heads, scores: Scores) -> torch.Tensor:
        q, k, v, of = heads
        self._reach(layer)
        if self.keep and of is None:
            self._pairs[layer] = k, v
        past = self.prefix.layer(layer if of is None else of) if self.prefix is not None else None
        if self.rows is not None and scores.prefix is None:
            return self._of_rows(q, k, v, scores, past, self.rows)
        out = self._of_all(q, k, v, scores, past)
        return out if self.rows is None else out[:, :, self.rows]

    def _of_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, past: Pair | None
    ) -> torch.Tensor:
        rules = [scores.over(self._past(i) + n) for i, n in enumerate(self.lengths)]
        if all(rule.is_plain for rule in rules) and (not self._above or q.device.type == "cpu"):
            return attend_causal(q, k, v, rules[0].scale, past, self.lengths, self._above)
        out = torch.empty_like(q)
        for i in range(len(self.lengths)):
            cut, before = self._cut(i), self._seen(i, k, v, past)
            own = q[:, :, cut], k[:, :, cut], v[:, :, cut]
            if rules[i].is_plain:
                out[:, :, cut] = attend_causal(*own, rules[i].scale, before)
            else:
                out[:, :, cut] = self._scored(*own, rules[i].of(cut), before, i)
        return out

    def _of_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, past: Pair | None, rows: list[int]
    ) -> torch.Tensor:
        """Attention of some of the queries."""
        q = q[:, :, rows]
        segments = [bisect_right(self.starts, row) - 1 for row in rows]
        spans = [slice(self.starts[i], row + 1) for i, row in zip(segments, rows, strict=True)]
        rule = scores.over(max(self._past(i) + s.stop - s.start for i, s in zip(segments, spans, strict=True)))
        if rule.is_plain:
            places = [(slice(bisect_left(rows, a.start), bisect_left(rows, a.stop)), keys) for a, keys in self._above]
            above = [(queries, keys) for queries, keys in places if queries.start < queries.stop]
            return attend_rows(q, k, v, rule.scale, past, spans, above)
        parts = []
        for i, (own, s) in enumerate(zip(spans, segments, strict=True)):
            before = self._seen(s, k, v, past)
            parts.append(self._scored(q[:, :, i : i + 1], k[:, :, own], v[:, :, own], rule, before, s))
        return torch.cat(parts, 2)

    def _scored(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: Scores,
        past: Pair | None,
        segment: int,
    ) -> torch.Tensor:
        if past is not None:
            k, v = torch.cat([past[0], k.to(past[0].dtype)], 2), torch.cat([past[1], v.to(past[1].dtype)], 2)
        if scores.prefix is not None:
            scores = replace(scores, prefix=scores.prefix[segment : segment + 1])
        return attend_scored(q, k, v, scores, torch.arange(k.shape[2], device=q.device)[None])

    def recur(self, layer: int, run: Recurrence, x: torch.Tensor) -> torch.Tensor:
        self._reach(layer)
        if self._above:
            raise InputError("a recurrence does not continue a segment of the same pass")
        before = self.prefix.state(layer) if self.prefix is not None else None
        out, after = self._segments.run(run, x, before, keep=self.keep)
        if self.keep:
            self.states[layer] = after
        return out

    def _reach(self, layer: int) -> None:
        if layer != self._layer:
            self._layer = layer
            self._on_layer()

    def end(self) -> None:
        """Nothing to do: a packed pass is never continued, only its segments."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys are kept."""
        return tuple(self._pairs)

    def kept(self, layer: int) -> Pair:
        """Keys and values of the whole row, [1, kv_heads, sum(lengths), head_dim] each (`keep=True`)."""
        return self._pairs[layer]

    def segment(self, index: int) -> KVCache:
        """Prefix and segment `index` as a cache of their own (`keep=True`).

        Raises:
            InputError: the keys were not kept.
        """
        if not self.keep:
            raise InputError("this packed pass kept nothing; make it with keep=True")
        cut = self._cut(index)
        pairs = {}
        for layer, pair in self._pairs.items():
            own = of_both(pair, lambda held: held[:, :, cut].clone())  # a view would keep the whole row alive
            if self.prefix is not None:
                before = self.prefix.layer(layer)
                keys = torch.cat([before[0], own[0]], 2)
                own = keys, keys if own[1] is own[0] else torch.cat([before[1], own[1]], 2)
            pairs[layer] = own
        row = slice(index, index + 1)
        states = {layer: tuple(held[row].clone() for held in state) for layer, state in self.states.items()}
        memory = {name: held[row].clone() for name, held in self.memory.items()}
        return KVCache.of(pairs, states, memory, self.past + self.lengths[index])


def _above(before: Sequence[tuple[int, ...]], cuts: Sequence[slice]) -> list[tuple[slice, slice]]:
    """The tokens of all segments below one, and the tokens of that one, for each that has any."""
    below: dict[int, list[int]] = {}
    for i, segments in enumerate(before):
        for segment in segments:
            below.setdefault(segment, []).append(i)
    return [(slice(cuts[some[0]].start, cuts[some[-1]].stop), cuts[segment]) for segment, some in below.items()]
