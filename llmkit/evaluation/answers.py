"""Answers that are kept while a model is scored, so that the same run goes on after an interruption.

Whether a run is the same is decided by its key (`identity.answers_key`), not by the name of its output: answers that a
run beside it left under another name are taken over.

Scores depend in their last bits on what is computed in one batch. A resumed run therefore makes the batches of the
whole run and leaves out those whose every answer is known: its scores are those of a run that nothing disturbed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from llmkit.errors import OutputError
from llmkit.evaluation.prefix import Query
from llmkit.pipeline.journal import HeldElsewhere, Journal, read_journal
from llmkit.pipeline.stage import Stage

SUFFIX = ".answers"
"""What the journal of a run ends with: `run.json.answers` lies beside `run.json` until that is written."""

TokenScore = tuple[float, bool, float]
"""Of one target token: log-probability, whether greedy decoding would choose it, logit."""

TargetScore = tuple[int, int, float, bool, float]
"""One target token: query, slot among its targets, and its `TokenScore`."""


class Answers:
    """The answers of one run, in a journal; where none can be written, nothing is kept and nothing else changes.

    Args:
        path: the journal; None keeps nothing.
        digest: identifies model, settings and versions: answers of another run are dropped.
        subject: what is made, for messages.

    Attributes:
        n_reused: answers that an interrupted run had left and that were taken.

    Raises:
        HeldElsewhere: another process has the journal open.
    """

    def __init__(self, path: Path | None = None, digest: str = "", subject: str = "") -> None:
        self.n_reused = 0
        self._n_calls = 0
        self._is_empty = True
        self._stage: Stage | None = None
        self._entries: list[tuple[str, Mapping[str, Any]]] = []
        if path is None:
            return
        try:
            self._stage = Stage(path, digest, subject=subject)
            self._entries = self._stage.entries or self._taken_over(path, digest)
        except HeldElsewhere:
            raise
        except OutputError:  # a full disk, no permission
            self.close()

    def _taken_over(self, path: Path, digest: str) -> list[tuple[str, Mapping[str, Any]]]:
        """What a run with the same key left beside `path` under another name; one that still goes on keeps its own."""
        for other in sorted(path.parent.glob("*" + SUFFIX)):
            lines = read_journal(other) if other != path else []
            if not lines or lines[0].get("plan") != digest:
                continue
            with suppress(OutputError, OSError), closing(Journal(other, digest)) as journal:
                entries = [(line["block"], line["result"]) for line in journal.entries]
                for call, result in entries:
                    self.append(call, result)
                journal.remove()
                return entries
        return []

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
        """Close the journal; the file stays, unless it holds no answer."""
        if self._stage is not None and self._is_empty and not self._entries:
            with suppress(OSError, OutputError):
                self._stage.remove()
        elif self._stage is not None:
            self._stage.close()
        self._stage = None

    def _next(self, digest: str) -> KeptAnswers:
        self._n_calls += 1
        call = f"{self._n_calls} {digest}"
        return KeptAnswers(self, call, [result for name, result in self._entries if name == call])

    def append(self, call: str, answers: Mapping[str, Any]) -> None:
        """More answers to a call; a disk that takes none ends the keeping, not the scoring."""
        if self._stage is None:
            return
        try:
            self._is_empty = False
            self._stage.append(call, answers)
        except OutputError:
            self.close()


class KeptAnswers:
    """What is known of the answers of one call.

    Attributes:
        reads: (query, slot) -> score.
        texts: request -> generated text.
    """

    def __init__(self, answers: Answers, call: str, results: Sequence[Mapping[str, Any]] = ()) -> None:
        self._answers = answers
        self._call = call
        self.reads: dict[tuple[int, int], TokenScore] = {}
        self.texts: dict[int, str] = {}
        for result in results:
            self.reads |= {(read[0], read[1]): tuple(read[2:]) for read in result.get("reads", ()) if len(read) == 5}
            self.texts |= {int(request): text for request, text in result.get("texts", {}).items()}
        answers.n_reused += len(self.reads) + len(self.texts)

    def add_reads(self, reads: Sequence[TargetScore]) -> None:
        """Keep what one forward has answered."""
        self._answers.append(self._call, {"reads": reads})

    def add_texts(self, texts: dict[int, str]) -> None:
        """Keep what one batch has answered."""
        self.texts |= texts
        self._answers.append(self._call, {"texts": texts})


def count_answers(path: Path) -> int:
    """The answers that a journal holds."""
    results = [entry.get("result", {}) for entry in read_journal(path)]
    return sum(len(result.get("reads", ())) + len(result.get("texts", ())) for result in results)
