"""Answers that are kept while a model is scored, so that the same run goes on after an interruption.

Scores depend in their last bits on what is computed in one batch. A resumed run therefore makes the batches of the
whole run and leaves out those whose every answer is known: its scores are those of a run that nothing disturbed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.errors import OutputError
from llmkit.evaluation.prefix import Query
from llmkit.pipeline.journal import read_journal
from llmkit.pipeline.stage import Stage

TargetScore = tuple[int, int, float, bool]
"""One target token: (query, slot among its targets, log-probability, whether greedy decoding would choose it)."""


class Answers:
    """The answers of one run, in a journal; where none can be written, nothing is kept and nothing else changes.

    Args:
        path: the journal; None keeps nothing.
        digest: identifies model, settings and versions: answers of another run are dropped.

    Attributes:
        n_reused: answers that an interrupted run had left and that were taken.
    """

    def __init__(self, path: Path | None = None, digest: str = "") -> None:
        self.n_reused = 0
        self._n_calls = 0
        self._stage: Stage | None = None
        if path is not None:
            with suppress(OutputError):  # a full disk, no permission, or the same run in another process
                self._stage = Stage(path, digest)

    def of_queries(self, queries: Sequence[Query]) -> KeptAnswers:
        """The kept answers to the next call, which scores `queries`."""
        if self._stage is None:
            return KeptAnswers(self, "")
        from xxhash import xxh3_128

        hasher = xxh3_128()
        for query in queries:
            for ids in (query.tokens, query.targets):
                hasher.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
        return self._next(hasher.hexdigest())

    def of_prompts(self, requests: Iterable[object]) -> KeptAnswers:
        """The kept answers to the next call, which generates answers to `requests`."""
        if self._stage is None:
            return KeptAnswers(self, "")
        from xxhash import xxh3_128

        return self._next(xxh3_128(repr(list(requests)).encode("utf-8", "surrogatepass")).hexdigest())

    def close(self) -> None:
        """Let go of the journal; it stays."""
        if self._stage is not None:
            self._stage.close()
        self._stage = None

    def _next(self, digest: str) -> KeptAnswers:
        self._n_calls += 1
        call = f"{self._n_calls} {digest}"
        entries = self._stage.entries if self._stage is not None else []
        return KeptAnswers(self, call, [result for name, result in entries if name == call])

    def append(self, call: str, answers: Mapping[str, Any]) -> None:
        """More answers to a call; a disk that takes none ends the keeping, not the scoring."""
        if self._stage is None:
            return
        try:
            self._stage.append(call, answers)
        except OutputError:
            self.close()


class KeptAnswers:
    """What is known of the answers of one call.

    Attributes:
        reads: (query, slot) -> (log-probability, is greedy).
        texts: request -> generated text.
    """

    def __init__(self, answers: Answers, call: str, results: Sequence[Mapping[str, Any]] = ()) -> None:
        self._answers = answers
        self._call = call
        self.reads: dict[tuple[int, int], tuple[float, bool]] = {}
        self.texts: dict[int, str] = {}
        for result in results:
            self.reads |= {(query, slot): (logprob, same) for query, slot, logprob, same in result.get("reads", ())}
            self.texts |= {int(request): text for request, text in result.get("texts", {}).items()}
        answers.n_reused += len(self.reads) + len(self.texts)

    def add_reads(self, reads: Sequence[TargetScore]) -> None:
        """Keep what one forward has answered."""
        self._answers.append(self._call, {"reads": reads})

    def add_texts(self, texts: dict[int, str]) -> None:
        """Keep what one batch has answered."""
        self._answers.append(self._call, {"texts": texts})


def count_answers(path: Path) -> int:
    """The answers that a journal holds."""
    results = [entry.get("result", {}) for entry in read_journal(path)]
    return sum(len(result.get("reads", ())) + len(result.get("texts", ())) for result in results)
