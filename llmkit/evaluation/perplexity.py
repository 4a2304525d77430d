"""Perplexity of a text, by the sliding windows of the transformers documentation.

The text is encoded whole, with the special tokens that the tokenizer adds. Windows of `context` tokens advance by
`stride`; each scores the tokens that the window before did not, from the tokens before them in the window. The first
token of the text is not scored; with `stride` = `context` (disjoint windows, as most papers on quantization have it)
neither is the first of any window. Perplexity is exp of the mean negative log-likelihood of the scored tokens.

Source: transformers, docs "Perplexity of fixed-length models".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmkit.decoder.language_model import LanguageModel
from llmkit.errors import InputError, counted
from llmkit.lazy_imports import torch
from llmkit.pipeline.progress import NO_PROGRESS, Progress

# Positions whose logits are in memory at a time.
_HEAD_ROWS = 256
_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of one text.

    Attributes:
        nll: mean negative log-likelihood of a scored token, in nats.
        stderr: its standard error over tokens.
        n_scored: tokens that were scored.
        n_tokens: tokens of the text.
    """

    nll: float
    stderr: float
    n_scored: int
    n_tokens: int
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinite beyond the range of a float (see `bits_per_token`)."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_token(self) -> float:
        """The mean in bits."""
        return self.nll / math.log(2)


def windows(n_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored position) of each window; positions count from the start of the text."""
    spans = []
    scored_to = 0
    for start in range(0, n_tokens, stride):
        end = min(start + context, n_tokens)
        first = max(scored_to, start + 1)
        if first < end:
            spans.append((start, end, first))
        scored_to = end
        if end == n_tokens:
            break
    return spans


def measure_perplexity(
    decoder: LanguageModel,
    ids: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    progress: Progress = NO_PROGRESS,
    keep: Callable[[torch.Tensor, torch.Tensor], None] = lambda logits, targets: None,
) -> Perplexity:
    """Perplexity of the tokens `ids`.

    Args:
        context: tokens in a window.
        stride: how far windows advance; None for disjoint ones.
        keep: told the float32 logits [tokens, vocab] before some scored tokens, and these tokens' ids, in order.

    Raises:
        InputError: fewer than two tokens, or a stride that does not fit the context.
    """
    step = context if stride is None else stride
    spans = checked_windows(len(ids), context, step)
    tally = Tally()
    progress.begin(sum(end - start for start, end, _ in spans), "perplexity", "tokens")
    try:
        with torch.inference_mode():
            for batch in batches(spans):
                for logits, targets in scored_logits(decoder, ids, batch):
                    tally.add(negative_log_likelihood(logits, targets))
                    keep(logits, targets)
                progress.advance(sum(end - start for start, end, _ in batch))
    finally:
        progress.end()
    return tally.perplexity(len(ids), context, step)


def checked_windows(n_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of a text of so many tokens.

    Raises:
        InputError: fewer than two tokens, or a stride that does not fit the context.
    """
    if context < 2 or not 1 <= stride <= context:
        raise InputError(
            f"a context of {context} and a stride of {stride} do not make windows: 1 <= stride <= context",
            hint=f"--stride {context}" if context >= 2 else "--context 2",
        )
    if n_tokens < 2:
        raise InputError(
            f"the text has {counted(n_tokens, 'token')}, too few to predict one", hint="give a longer text"
        )
    return windows(n_tokens, context, stride)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In nats, float64 [tokens], of float32 logits [tokens, vocab] and the ids [tokens] that came."""
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return (torch.logsumexp(logits, -1) - chosen).double()


class Tally:
    """Negative log-likelihoods, summed up."""

    def __init__(self) -> None:
        self._total = self._squares = 0.0
        self._n = 0

    def add(self, values: torch.Tensor) -> None:
        """Add values, float64 [tokens]."""
        self._total += float(values.sum())
        self._squares += float((values * values).sum())
        self._n += values.numel()

    def perplexity(self, n_tokens: int, context: int, stride: int) -> Perplexity:
        """The perplexity of a text of `n_tokens` tokens in these windows."""
        nll = self._total / self._n
        variance = max(self._squares / self._n - nll * nll, 0.0)
        return Perplexity(nll, math.sqrt(variance / self._n), self._n, n_tokens, context, stride)


def batches(spans: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Windows of one length together."""
    groups: list[list[tuple[int, int, int]]] = []
    for span in spans:
        length = span[1] - span[0]
        last = groups[-1] if groups else []
        if last and last[0][1] - last[0][0] == length and (len(last) + 1) * length <= _BATCH_TOKENS:
            last.append(span)
        else:
            groups.append([span])
    return groups


def scored_logits(
    decoder: LanguageModel, ids: Sequence[int], batch: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 logits [tokens, vocab] before the scored tokens of windows of one length, and these tokens [tokens].

    A few hundred tokens at a time; of any model in the same pieces.
    """
    rows = torch.tensor([list(ids[start:end]) for start, end, _ in batch])
    hidden = decoder.hidden(rows)
    for i, low, high in scored_ranges(batch):
        start = batch[i][0]
        logits = decoder.logits(hidden[i, low - start - 1 : high - start - 1])
        yield logits, torch.tensor(list(ids[low:high]), device=logits.device)


def scored_ranges(batch: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """(window of the batch, first, end) of a few hundred scored positions at a time, from the start of the text."""
    for i, (_, end, first) in enumerate(batch):
        for low in range(first, end, _HEAD_ROWS):
            yield i, low, min(low + _HEAD_ROWS, end)
