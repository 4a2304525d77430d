"""Perplexity of a text, by the sliding windows of the transformers documentation.

The text is encoded whole, with the special tokens that the tokenizer adds. Windows of `context` tokens advance by
`stride`; each scores the tokens that the window before did not, from the tokens before them in the window. The first
token of the text is not scored; with `stride` = `context` (disjoint windows, as most papers on quantization have it)
neither is the first of any window. Perplexity is exp of the mean negative log-likelihood of the scored tokens.

Source: transformers, docs "Perplexity of fixed-length models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.errors import InputError
from llmkit.pipeline.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    import torch

    from llmkit.decoder.language_model import LanguageModel

__all__ = ["Perplexity", "measure_perplexity", "windows"]

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
        """The exponential of the mean; infinite beyond the range of a float (`bits_per_token` still tells)."""
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
    found = []
    scored_to = 0
    for start in range(0, n_tokens, stride):
        end = min(start + context, n_tokens)
        first = max(scored_to, start + 1)
        if first < end:
            found.append((start, end, first))
        scored_to = end
        if end == n_tokens:
            break
    return found


def measure_perplexity(
    decoder: LanguageModel,
    ids: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Perplexity:
    """Perplexity of the tokens `ids`.

    Args:
        context: tokens in a window.
        stride: how far windows advance; None for disjoint ones.

    Raises:
        InputError: fewer than two tokens, or a stride that does not fit the context.
    """
    import torch

    step = context if stride is None else stride
    if context < 2 or not 1 <= step <= context:
        raise InputError(f"a context of {context} and a stride of {step} do not make windows: 1 <= stride <= context")
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens, too few to predict one", hint="give a longer text")
    spans = windows(len(ids), context, step)
    total = squares = 0.0
    n_scored = 0
    progress.begin(sum(end - start for start, end, _ in spans), "perplexity", "tokens")
    try:
        with torch.inference_mode():
            for batch in _batches(spans):
                values = _score(decoder, ids, batch)
                total += float(values.sum())
                squares += float((values * values).sum())
                n_scored += values.numel()
                progress.advance(sum(end - start for start, end, _ in batch))
    finally:
        progress.end()
    nll = total / n_scored
    variance = max(squares / n_scored - nll * nll, 0.0)
    return Perplexity(nll, math.sqrt(variance / n_scored), n_scored, len(ids), context, step)


def _batches(spans: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Windows of one length together."""
    batches: list[list[tuple[int, int, int]]] = []
    for span in spans:
        length = span[1] - span[0]
        last = batches[-1] if batches else []
        if last and last[0][1] - last[0][0] == length and (len(last) + 1) * length <= _BATCH_TOKENS:
            last.append(span)
        else:
            batches.append([span])
    return batches


def _score(decoder: LanguageModel, ids: Sequence[int], batch: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Negative log-likelihoods (float64) of the scored tokens of windows of one length."""
    import torch

    rows = torch.tensor([list(ids[start:end]) for start, end, _ in batch])
    hidden = decoder.hidden(rows)
    found = []
    for i, (start, end, first) in enumerate(batch):
        for low in range(first, end, _HEAD_ROWS):
            high = min(low + _HEAD_ROWS, end)
            logits = decoder.logits(hidden[i, low - start - 1 : high - start - 1])
            targets = torch.tensor(list(ids[low:high]), device=logits.device)
            chosen = logits.gather(-1, targets[:, None])[:, 0]
            found.append((torch.logsumexp(logits, -1) - chosen).double().cpu())
    return torch.cat(found)
