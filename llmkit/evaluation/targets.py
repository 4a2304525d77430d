"""The tokens whose scores are asked for, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.evaluation.answers import KeptAnswers, TokenScore
from llmkit.evaluation.prefix import Query, Segment, depth_first
from llmkit.evaluation.waiting import HeadRead
from llmkit.lazy_imports import torch


@dataclass(frozen=True, slots=True)
class Score:
    """Of a continuation.

    Attributes:
        logprob: the natural logarithm of its probability.
        is_greedy: greedy decoding would produce it.
        logit: of its first token, before the softmax; None where the engine does not tell it.
    """

    logprob: float
    is_greedy: bool
    logit: float | None = None


class Targets:
    """The target tokens of all queries, and the log-probability of each that is known."""

    def __init__(self, queries: Sequence[Query], kept: KeptAnswers) -> None:
        self._targets = [q.targets for q in queries]
        self._found: list[list[TokenScore]] = [[(0.0, False, 0.0)] * len(q.targets) for q in queries]
        self._kept = kept
        for (query, slot), answer in kept.reads.items():
            self._found[query][slot] = answer

    def has_all(self, segments: Sequence[Segment]) -> bool:
        """Whether everything is known that is read in segments and below them."""
        if not self._kept.reads:
            return False
        reads = (read for segment in depth_first(segments) for read in segment.reads)
        return all((query, slot) in self._kept.reads for _, query, slot in reads)

    def fill(self, logits: torch.Tensor, rows: list[int], reads: list[HeadRead]) -> None:
        """Read `reads` from float32 logits [len(rows), V]."""
        at = {row: i for i, row in enumerate(rows)}
        where = torch.tensor([at[row] for row, _, _ in reads], device=logits.device)
        targets = torch.tensor([self._targets[q][slot] for _, q, slot in reads], device=logits.device)
        logprobs = torch.log_softmax(logits, -1)[where, targets].tolist()
        is_greedy = (logits.argmax(-1)[where] == targets).tolist()
        raw = logits[where, targets].tolist()
        some = list(zip(logprobs, is_greedy, raw, strict=True))
        for (_, query, slot), score in zip(reads, some, strict=True):
            self._found[query][slot] = score
        self._kept.add_reads([(q, slot, *score) for (_, q, slot), score in zip(reads, some, strict=True)])

    def scores(self) -> list[Score]:
        """One score a query: its targets' log-probabilities added up."""
        return [Score(sum(x for x, _, _ in s), all(same for _, same, _ in s), s[0][2]) for s in self._found]
