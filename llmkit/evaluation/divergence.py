"""How far the next-token distributions of one model are from those of another: what a change of its weights did.

A perplexity can improve while answers flip (Dutta et al. 2024, arXiv:2407.09141); so beside both perplexities stand the
mean Kullback-Leibler divergence from the first model to the second, and the share of tokens for which another one is
the most likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.decoder.language_model import LanguageModel
from llmkit.evaluation.perplexity import Perplexity, Tally, batches, scored_logits, windows
from llmkit.lazy_imports import torch
from llmkit.pipeline.progress import NO_PROGRESS, Progress


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two models over one text.

    Attributes:
        before, after: perplexities of both.
        kl: mean of sum p ln(p / q) over scored tokens, in nats; p of the first model, q of the second.
        flipped: share of scored tokens, 0 to 1, before which the likeliest one is another.
    """

    before: Perplexity
    after: Perplexity
    kl: float
    flipped: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "perplexity_before": self.before.perplexity, "perplexity_after": self.after.perplexity,
            "kl_divergence": self.kl, "flipped": self.flipped, "n_scored": self.after.n_scored,
        }  # fmt: skip


def measure_divergence(
    before: LanguageModel,
    after: LanguageModel,
    ids: Sequence[int],
    *,
    context: int,
    progress: Progress = NO_PROGRESS,
) -> Divergence:
    """Both models over the tokens `ids`, in disjoint windows of `context` tokens."""
    tallies, kl, n_flipped, n = (Tally(), Tally()), 0.0, 0, 0
    spans = windows(len(ids), context, context)
    progress.begin(sum(end - start for start, end, _ in spans), "comparing with the float model", "tokens")
    try:
        with torch.inference_mode():
            for batch in batches(spans):
                pieces = zip(scored_logits(before, ids, batch), scored_logits(after, ids, batch), strict=True)
                for (first, targets), (second, _) in pieces:
                    tallies[0].add(first, targets)
                    tallies[1].add(second, targets)
                    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
                    kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
                    n_flipped += int((first.argmax(-1) != second.argmax(-1)).sum())
                    n += len(targets)
                progress.advance(sum(end - start for start, end, _ in batch))
    finally:
        progress.end()
    perplexities = [tally.perplexity(len(ids), context, context) for tally in tallies]
    return Divergence(perplexities[0], perplexities[1], kl / n, n_flipped / n)
