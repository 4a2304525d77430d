"""What engines that only take whole sequences have in common: each distinct sequence once, in batches that are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llmkit.evaluation.answers import Answers
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.generation import Request
from llmkit.evaluation.prefix import Query, Tokens
from llmkit.evaluation.scoring import Usage
from llmkit.evaluation.targets import Score
from llmkit.pipeline.progress import Progress

T = TypeVar("T")

ServedScore = tuple[float, bool]
"""The log-probability of a target token, and whether greedy decoding would choose it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A sequence whose last tokens are scored.

    Attributes:
        tokens: all of it.
        n_targets: how many of the last tokens.
    """

    tokens: Tokens
    n_targets: int


class ServedEngine(ABC):
    """An engine that scores sequences one by one; prefixes are shared in the engine, where it can.

    Args:
        progress: told of tokens and answers as they come.

    Attributes:
        backend: as `--backend` calls it.
        batch: sequences that are handed over at a time; an interruption loses no more.
    """

    backend: str
    device = "served"
    batch = 256

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.answers = Answers()
        self.usage = Usage()
        self.warnings: list[str] = []

    @property
    @abstractmethod
    def runtime(self) -> Mapping[str, Any]:
        """What the record says of it."""

    @abstractmethod
    def logprobs(self, sequences: Sequence[Scored]) -> list[list[ServedScore]]:
        """The scores of each sequence's targets."""

    @abstractmethod
    def texts(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """The continuation of each prompt; what follows a stop string may be there still."""

    def score(self, queries: Sequence[Query], label: str = "scoring") -> list[Score]:
        """The scores, in the order of the queries."""
        kept = self.answers.of_queries(queries)
        known = dict(kept.reads)
        askers: dict[Scored, list[int]] = {}
        for i, query in enumerate(queries):
            askers.setdefault(Scored((*query.tokens, query.targets[-1]), len(query.targets)), []).append(i)
        self.usage.tokens_unshared += sum(len(row) for row in {q.tokens for q in queries})
        # in order of their tokens, so that what shares a prefix comes together
        sequences = sorted(askers, key=lambda s: s.tokens)
        self.progress.begin(sum(len(s.tokens) for s in sequences), label, "tokens")
        try:
            for batch in _batches(sequences, self.batch):
                left = [s for s in batch if any((askers[s][0], j) not in known for j in range(s.n_targets))]
                for sequence, scores in zip(left, self.logprobs(left) if left else [], strict=True):
                    reads = {(i, j): (*pair, 0.0) for i in askers[sequence] for j, pair in enumerate(scores)}
                    kept.add_reads([(*place, *score) for place, score in reads.items()])
                    known |= reads
                    self.usage.tokens += len(sequence.tokens)
                self.usage.forwards += bool(left)
                self.progress.advance(sum(len(s.tokens) for s in batch))
        finally:
            self.progress.end()
        return [
            Score(sum(x for x, _, _ in slots), all(same for _, same, _ in slots))  # no server tells logits
            for slots in ([known[i, j] for j in range(len(q.targets))] for i, q in enumerate(queries))
        ]

    def generate(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """The answers, in the order of the requests."""
        kept = self.answers.of_prompts((r.tokens, r.stops, r.max_new, r.sampling) for r in requests)
        self.progress.begin(len(requests), "generating", "answers")
        try:
            for batch in _batches(sorted(requests, key=lambda r: (r.kind, r.tokens)), self.batch):
                left = [r for r in batch if r.index not in kept.texts]
                if left:
                    texts = self.texts(left, encoder, eos_ids)
                    kept.add_texts({r.index: r.cut(text) for r, text in zip(left, texts, strict=True)})
                self.progress.advance(len(batch))
        finally:
            self.progress.end()
        return [kept.texts[r.index] for r in requests]


def _batches(items: Sequence[T], n: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), n):
        yield items[start : start + n]
