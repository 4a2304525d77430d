"""The states of recurrences: what a layer keeps of past tokens in a size that does not grow with their number.

A state is a tuple of tensors, each with a row for each sequence: the window of a short convolution, the matrix of a
linear attention. A recurrence gets rows whose padding, if any, follows their tokens; the classes here bring a batch,
padded wherever, or segments side by side into that form and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

from llmkit.lazy_imports import torch

State: TypeAlias = "tuple[torch.Tensor, ...]"
"""Each [B, …]."""
Recurrence: TypeAlias = "Callable[[torch.Tensor, State | None, torch.Tensor | None], tuple[torch.Tensor, State]]"
"""(x [B, S, width], state or None at the start, real or None) -> (y [B, S, width'], the state after the last token).

`real` [B, S] bool is False for padding, which follows the tokens of its row and changes no state; None: no padding.
"""
_MOST_PADDING = 1.25  # segments are rows of one batch where the longest is at most so much longer than the shortest
_MOST_ROWS = 64  # of such a batch: each has a state of its own, which may be megabytes


class Rows:
    """A batch of sequences, padded in any places.

    Args:
        real: [B, S] bool, False for padding; None where there is none.
    """

    def __init__(self, real: torch.Tensor | None) -> None:
        self._order: torch.Tensor | None = None
        if real is not None and not bool(real.all()):
            self._order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
            self._back = torch.argsort(self._order, dim=1)[..., None]
            self._real = real.gather(1, self._order)

    def run(self, run: Recurrence, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """What a recurrence gives for x [B, S, width], and its state."""
        if self._order is None:
            return run(x, state, None)
        y, after = run(x.take_along_dim(self._order[..., None], 1), state, self._real)
        return y.take_along_dim(self._back, 1), after


class Segments:
    """Sequences side by side in one row [1, sum(lengths)], all from one state: those of like length are one batch."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths, self._starts = lengths, (0, *accumulate(lengths))
        self._groups: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            group = self._groups[-1] if self._groups else []
            if group and len(group) < _MOST_ROWS and lengths[i] <= _MOST_PADDING * lengths[group[0]]:
                group.append(i)
            else:
                self._groups.append([i])

    def run(
        self, run: Recurrence, x: torch.Tensor, state: State | None, *, keep: bool = True
    ) -> tuple[torch.Tensor, State]:
        """What a recurrence gives for x [1, sum(lengths), width], and the states, a row for each segment.

        Args:
            state: one row, which all segments go on from.
            keep: False forgets the states, and gives none.
        """
        pieces: dict[int, torch.Tensor] = {}
        after: list[State] = []
        for group in self._groups:
            longest = self._lengths[group[-1]]
            rows = [x[0, self._starts[i] : self._starts[i] + self._lengths[i]] for i in group]
            batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            counts = torch.tensor([self._lengths[i] for i in group], device=x.device)
            real = torch.arange(longest, device=x.device) < counts[:, None]
            before = None if state is None else tuple(held.expand(len(group), *held.shape[1:]) for held in state)
            y, held = run(batch, before, None if len(set(counts.tolist())) == 1 else real)
            pieces |= {i: y[row, : self._lengths[i]] for row, i in enumerate(group)}
            if keep:
                after.append(held)
        place = torch.argsort(torch.tensor([i for group in self._groups for i in group])).to(x.device)
        states = tuple(torch.cat(parts)[place] for parts in zip(*after, strict=True))
        return torch.cat([pieces[i] for i in range(len(pieces))])[None], states


def short_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal convolution of each channel over a token and the K - 1 before it: y_t = sum_k w_k x_(t - K + 1 + k).

    Args:
        x: [B, S, C].
        weight: [C, 1, K], as of a grouped `Conv1d`.
        bias: [C], or None.
        window: [B, K - 1, C], the inputs before x; zeros at the start.
        real: [B, S] bool as a `Recurrence` gets it.

    Returns:
        y [B, S, C], and the next window.
    """
    n_before = weight.shape[-1] - 1
    whole = torch.cat([window.to(x.dtype), x], 1)
    y = torch.nn.functional.conv1d(whole.transpose(1, 2), weight, bias, groups=x.shape[-1]).transpose(1, 2)
    return y, last_tokens(whole, n_before, real)


def last_tokens(whole: torch.Tensor, n: int, real: torch.Tensor | None) -> torch.Tensor:
    """The last `n` inputs of each row, [B, n, C], of [B, n + S, C]: the `n` before the new ones, and those."""
    if real is None:
        return whole[:, whole.shape[1] - n :]
    at = real.sum(1)[:, None] + torch.arange(n, device=real.device)
    return whole.take_along_dim(at[..., None], 1)
