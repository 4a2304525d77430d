"""How far the next-token distributions of one model are from those of another: what a change of its weights did.

A perplexity can improve while answers flip (Dutta et al. 2024, arXiv:2407.09141); so beside both perplexities stand the
Kullback-Leibler divergence from the first model to the second, and the share of tokens for which another one is the
most likely. The first model is computed along, or its distributions come from a file (`llmkit.evaluation.reference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llmkit.decoder.language_model import LanguageModel
from llmkit.errors import InputError
from llmkit.evaluation.perplexity import (
    Perplexity,
    Tally,
    batches,
    checked_windows,
    negative_log_likelihood,
    scored_logits,
)
from llmkit.evaluation.statistics import Mean, mean, micro, quantile
from llmkit.lazy_imports import np, torch
from llmkit.pipeline.progress import NO_PROGRESS, Progress

Spans = Sequence[tuple[int, int, int]]
_MAX_EXPONENT = 700.0  # of a float's range


@dataclass(frozen=True, slots=True)
class Piece:
    """The first model before some scored tokens.

    Attributes:
        log_p: natural log-probabilities, float32 [tokens, vocab].
        nll: negative log-likelihoods of the tokens that came, float64 [tokens].
        top: the likeliest ids [tokens].
    """

    log_p: torch.Tensor
    nll: torch.Tensor
    top: torch.Tensor


class Distributions(Protocol):
    """Where the first model's distributions come from."""

    def pieces(self, ids: Sequence[int], batch: Spans) -> Iterator[Piece]:
        """Before the scored tokens of windows of one length, in the pieces of `scored_logits`; batches in order."""


@dataclass(frozen=True, slots=True)
class ModelDistributions:
    """A model's distributions, computed along."""

    model: LanguageModel

    def pieces(self, ids: Sequence[int], batch: Spans) -> Iterator[Piece]:
        """See `Distributions`."""
        for logits, targets in scored_logits(self.model, ids, batch):
            yield Piece(logits.log_softmax(-1), negative_log_likelihood(logits, targets), logits.argmax(-1))


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two models over one text.

    Attributes:
        before, after: perplexities of both.
        kl: mean of sum p ln(p / q) over scored tokens, in nats; p of the first model, q of the second.
        kl_median, kl_99: its median and 99th percentile over tokens.
        flipped: share of scored tokens, 0 to 1, before which the likeliest one is another.
        change: mean of (second - first) negative log-likelihood of a token, in nats: the paired difference, with its
            standard error over tokens, and clustered by window.
    """

    before: Perplexity
    after: Perplexity
    kl: float
    kl_median: float
    kl_99: float
    flipped: float
    change: Mean

    @property
    def ratio(self) -> float:
        """The second perplexity over the first."""
        return math.exp(min(self.change.value, _MAX_EXPONENT))

    @property
    def ratio_interval(self) -> tuple[float, float]:
        """Its 95 % interval, by the larger of the two standard errors."""
        stderr = max(self.change.stderr or 0.0, self.change.stderr_clustered or 0.0)
        half = quantile(self.change.n_clusters) * stderr
        low, high = (math.exp(min(self.change.value + sign * half, _MAX_EXPONENT)) for sign in (-1, 1))
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        low, high = self.ratio_interval
        return {
            "perplexity_before": self.before.perplexity, "perplexity_after": self.after.perplexity,
            "perplexity_ratio": self.ratio, "perplexity_ratio_low": low, "perplexity_ratio_high": high,
            "nll_change": self.change.value, "nll_change_stderr": self.change.stderr,
            "nll_change_stderr_clustered": self.change.stderr_clustered,
            "kl_divergence": self.kl, "kl_median": self.kl_median, "kl_99": self.kl_99,
            "flipped": self.flipped, "n_scored": self.after.n_scored,
        }  # fmt: skip


def measure_divergence(
    before: Distributions,
    after: LanguageModel,
    ids: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Divergence:
    """Both models over the tokens `ids`, in windows as `measure_perplexity` has them.

    Args:
        before: the first model's distributions: `ModelDistributions(model)`, or a stored reference.

    Raises:
        InputError: fewer than two tokens, or a stride that does not fit the context.
    """
    step = context if stride is None else stride
    spans = checked_windows(len(ids), context, step)
    sums = _Sums()
    progress.begin(sum(end - start for start, end, _ in spans), "comparing with the first model", "tokens")
    try:
        with torch.inference_mode():
            for batch in batches(spans):
                pieces = zip(before.pieces(ids, batch), scored_logits(after, ids, batch), strict=True)
                for piece, (logits, targets) in pieces:
                    sums.add(piece, logits, targets)
                progress.advance(sum(end - start for start, end, _ in batch))
    finally:
        progress.end()
    return sums.divergence([end - first for _, end, first in spans], len(ids), context, step)


class _Sums:
    """What two models say before the same tokens, summed up."""

    def __init__(self) -> None:
        self._before, self._after = Tally(), Tally()
        self._kl: list[torch.Tensor] = []
        self._changes: list[torch.Tensor] = []
        self._n_flipped = 0

    def add(self, piece: Piece, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add some tokens: the first model's `piece`, the second's float32 logits [tokens, vocab], the ids [tokens].

        Raises:
            InputError: the two have different vocabularies.
        """
        if piece.log_p.shape != logits.shape:
            raise InputError(
                f"the first model gives {piece.log_p.shape[-1]} logits a token, the second "
                f"{logits.shape[-1]}: their vocabularies differ"
            )
        nll = negative_log_likelihood(logits, targets)
        self._before.add(piece.nll)
        self._after.add(nll)
        self._changes.append(nll.cpu() - piece.nll.cpu())
        log_p = piece.log_p.to(logits.device)
        terms = log_p.exp() * (log_p - logits.log_softmax(-1))
        self._kl.append(torch.where(log_p.isneginf(), 0.0, terms).sum(-1).double().cpu())
        self._n_flipped += int((piece.top.to(logits.device) != logits.argmax(-1)).sum())

    def divergence(self, n_scored: Sequence[int], n_tokens: int, context: int, stride: int) -> Divergence:
        """The divergence over a text of `n_tokens` tokens, in windows that score `n_scored` tokens each."""
        kl, change = torch.cat(self._kl), torch.cat(self._changes)
        median, high = (max(float(x), 0.0) for x in np.quantile(kl.numpy(), [0.5, 0.99]))
        by_window = micro(mean(w.tolist()) for w in change.split(list(n_scored)))
        return Divergence(
            before=self._before.perplexity(n_tokens, context, stride),
            after=self._after.perplexity(n_tokens, context, stride),
            kl=max(float(kl.mean()), 0.0),
            kl_median=median,
            kl_99=high,
            flipped=self._n_flipped / len(kl),
            change=replace(by_window, stderr=mean(change.tolist()).stderr),
        )
