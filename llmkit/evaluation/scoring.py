"""Scores of many continuations, each shared prefix computed once and the head only where a score is read.

Exactness: cuts are at token level, positions are those of the plain computation, and the log-softmax is taken in
float32 whatever the dtype of the weights, so that the scores are those of one full forward for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from threading import Lock
from typing import Any

from llmkit.decoder.language_model import LanguageModel
from llmkit.decoder.model import Decoder
from llmkit.decoder.packed import Packed
from llmkit.errors import InputError, RequirementError, is_memory_error
from llmkit.evaluation.answers import Answers
from llmkit.evaluation.cost import Batch, Costs
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.forwards import Forwards, n_streams
from llmkit.evaluation.generation import Generator, Request
from llmkit.evaluation.prefix import FORWARD_COST, Query, Segment, count_tokens, depth_first, pack, share_prefixes
from llmkit.evaluation.targets import Score, Targets
from llmkit.evaluation.waiting import WAITING_ROWS, HeadRead, WaitingRows, in_pieces
from llmkit.lazy_imports import torch
from llmkit.onnx.session import OrtDecoder
from llmkit.pipeline.pool import torch_threads
from llmkit.pipeline.progress import NO_PROGRESS, Progress

BATCH_TOKENS = 1024  # linear layers are no slower than with 2,048 on a CPU, and the heap needs no new pages
_WORK_NBYTES = 32 << 20  # of a forward's activations on a CPU: wide models compute fewer tokens at a time, as fast
_WIDE_TOKENS = 256  # at least
KEPT_TOKENS = 8 * BATCH_TOKENS
_LEAST_TOKENS = 16
_FEW_ROWS = 8  # the last layer is computed for rows that are read alone where they are one in so many, at most
_FIRST_ROWS = 64  # rows given to the head before the size of the vocabulary has been seen


@dataclass(slots=True)
class Usage:
    """What was computed, and what it would have been without sharing.

    Attributes:
        tokens: tokens that went through the layers.
        tokens_unshared: the sum of the lengths of the distinct sequences.
        forwards: forward calls.
        head_rows: positions whose logits were computed.
    """

    tokens: int = 0
    tokens_unshared: int = 0
    forwards: int = 0
    head_rows: int = 0


@dataclass
class Scorer:
    """Scores queries with a decoder; keeps count of what it computed.

    Args:
        decoder: the model.
        batch_tokens: how many tokens one forward takes at most; None takes `BATCH_TOKENS`, of a wide model on a CPU
            fewer.
        forward_cost: what one more forward costs in tokens; a shared stretch that saves less is repeated.
        progress: told of arithmetic as it is done, or of tokens where the decoder is not llmkit's own.
        answers: where what is scored is kept; answers found there are not computed again.
        kept_tokens: tokens of the caches that one forward leaves behind, a shared prefix counted for each segment; of
            the answers that grow side by side.
        logits_nbytes: float32 logits in memory at a time.
        memory: what the process may take, in bytes; batches are made so small that it does, by an estimate.

    Attributes:
        warnings: what the user should know: memory was short.

    Raises:
        InputError: `memory` is too little for the weights, or given for a decoder that is not llmkit's own.
    """

    decoder: LanguageModel
    batch_tokens: int | None = None
    forward_cost: int = FORWARD_COST
    progress: Progress = NO_PROGRESS
    usage: Usage = field(default_factory=Usage)
    answers: Answers = field(default_factory=Answers)
    kept_tokens: int = KEPT_TOKENS
    logits_nbytes: int = 64 << 20
    memory: int | None = None
    warnings: list[str] = field(default_factory=list)
    _n_vocab: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._costs: Costs | None = None
        self._waiting = WaitingRows()
        self._lock = Lock()  # around what several streams write
        self._per_unit = 1
        if isinstance(self.decoder, Decoder):
            self._costs = Costs.of(self.decoder.model, self.decoder.dtype.itemsize)
            self._n_vocab = self.decoder.model.dims.vocab
        self._fit(1)

    def _fit(self, longest: int) -> None:
        """Batches for sequences of up to so many tokens, in streams for the threads that there are."""
        self._streams = n_streams(self.decoder.device) if isinstance(self.decoder, Decoder) else 1
        self._threads = torch.get_num_threads() // self._streams
        self._now = Batch(self.batch_tokens or self._usual_tokens(), self.kept_tokens, self.logits_nbytes)
        if self.memory is not None:
            if self._costs is None:
                raise InputError(f"--memory is not for --backend {self.backend}", hint="give --batch-tokens")
            self._now = self._costs.fit(self.memory, longest, self._now, self._streams)

    def _usual_tokens(self) -> int:
        if self._costs is None or self.decoder.device.type != "cpu":
            return BATCH_TOKENS
        return max(_WIDE_TOKENS, min(BATCH_TOKENS, _WORK_NBYTES // self._costs.work_nbytes))

    @property
    def backend(self) -> str:
        """What computes the decoder."""
        return self.decoder.backend

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self.decoder.device)

    @property
    def runtime(self) -> dict[str, Any]:
        """Entries of the record about the decoder's library, beyond the versions."""
        return self.decoder.runtime if isinstance(self.decoder, OrtDecoder) else {}

    def score(self, queries: Sequence[Query], label: str = "scoring") -> list[Score]:
        """The scores, in the order of the queries."""
        self._fit(max((len(q.tokens) for q in queries), default=1))
        roots = share_prefixes(queries, self.forward_cost, self.decoder.exact_sharing_limit)
        self.usage.tokens_unshared += sum(len(row) for row in {q.tokens for q in queries})
        targets, self._waiting = Targets(queries, self.answers.of_queries(queries)), WaitingRows()
        self._per_unit = 1
        total = self._work(roots)
        self._per_unit, unit = (1, "tokens") if self._costs is None else _unit_of(total)
        self.progress.begin(self._work(roots), label, unit)
        try:
            with torch.inference_mode():
                try:
                    self._walk(roots, targets)
                except KeyboardInterrupt:
                    self._read_waiting(self._waiting, targets)
                    raise
                self._read_waiting(self._waiting, targets)
        finally:
            self.progress.end()
        return targets.scores()

    def generate(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """The answers, in the order of the requests."""
        self._fit(max((len(r.tokens) + r.max_new for r in requests), default=1))
        generator = Generator(
            self.decoder,
            encoder,
            eos_ids,
            batch_tokens=self._now.tokens,
            kept_tokens=self._now.kept_tokens,
            forward_cost=self.forward_cost,
            progress=self.progress,
        )
        kept = self.answers.of_prompts((r.tokens, r.stops, r.max_new, r.sampling) for r in requests)
        texts = generator.answer(requests, kept)
        self.warnings += generator.warnings
        return texts

    def _walk(self, roots: list[Segment], targets: Targets) -> None:
        def compute(batch: list[Segment], cache: Any, keep: bool) -> list[Any]:
            if self._is_answered(batch, targets):
                return []
            return self._compute(batch, cache, targets, keep=keep)

        joins = isinstance(self.decoder, Decoder) and self.decoder.continues_segments
        self._forwards = Forwards(roots, compute, lambda: self._now, self._streams, joins=joins)
        self._forwards.run()

    def _is_answered(self, batch: list[Segment], targets: Targets) -> bool:
        """Whether an interrupted run has answered all that these segments and those below them are for."""
        if not targets.has_all(batch):
            return False
        self.progress.advance(self._work(batch))
        return True

    def _work(self, segments: Sequence[Segment]) -> int:
        """What segments and those below them take, as `progress` counts it."""
        return sum(self._flop(segment.start, segment.stop) for segment in depth_first(segments))

    def _flop(self, start: int, stop: int) -> int:
        return self._costs.flop(start, stop) // self._per_unit if self._costs is not None else stop - start

    def _compute(self, batch: list[Segment], cache: Any, targets: Targets, *, keep: bool) -> list[Any]:
        """Compute segments that continue one cache, read their scores, hand back their caches if they are kept.

        Otherwise all that is below them is computed, too.
        """
        if not keep and any(s.children for s in batch):
            self._compute_joined(batch, cache, targets)
            return []
        if len(batch) == 1 and not batch[0].is_whole:
            return [self._in_stretches(batch[0], cache, targets, keep=keep)]
        stretches = [(s, 0 if s.is_whole else s.start, s.stop) for s in batch]
        caches = self._forward(stretches, cache, targets, keep=keep)
        if caches is not None:
            return caches
        middle = -(-len(batch) // 2)  # memory was short
        halves = [half for half in (batch[:middle], batch[middle:]) if half]
        return [c for half in halves for c in self._compute(half, cache, targets, keep=keep)]

    def _compute_joined(self, batch: list[Segment], cache: Any, targets: Targets) -> None:
        """Compute segments and all that is below them in one forward; where memory is short, one after the other."""
        segments = [*depth_first(batch)]
        places = {id(segment): i for i, segment in enumerate(segments)}
        parents = [places.get(id(segment.parent), -1) for segment in segments]
        stretches = [(s, s.start, s.stop) for s in segments]
        fits = count_tokens(batch) <= self._now.tokens
        if fits and self._forward(stretches, cache, targets, keep=False, parents=parents) is not None:
            return
        for segment in batch:
            left = segment.children
            caches = self._compute([segment], cache, targets, keep=bool(left))
            while left:
                some = next(pack(left, self._now.tokens, whole=True))
                self._compute(some, caches[0], targets, keep=False)
                left = left[len(some) :]

    def _in_stretches(self, segment: Segment, cache: Any, targets: Targets, *, keep: bool) -> Any:
        """Compute a segment, as many tokens at a time as a batch has."""
        start = segment.start
        while start < segment.stop:
            stop = min(start + self._now.tokens, segment.stop)
            caches = self._forward([(segment, start, stop)], cache, targets, keep=keep or stop < segment.stop)
            if caches is not None:
                cache, start = (caches[0] if caches else None), stop
        return cache

    def _forward(
        self,
        stretches: list[tuple[Segment, int, int]],
        cache: Any,
        targets: Targets,
        *,
        keep: bool,
        parents: Sequence[int] | None = None,
    ) -> list[Any] | None:
        """One forward over stretches (segment, start, stop), without padding; None, and smaller batches from now on,
        where memory was short."""
        try:
            return self.forward_in_memory(stretches, cache, targets, keep=keep, parents=parents)
        except Exception as error:
            if not is_memory_error(error):
                raise
        # here, as the error held the tensors
        n_tokens = min(self._now.tokens, sum(stop - start for _, start, stop in stretches))
        if n_tokens <= _LEAST_TOKENS or (len(stretches) == 1 and stretches[0][0].is_whole):
            raise RequirementError(
                f"too little memory: {n_tokens} tokens at a time do not fit either",
                hint="close other programs, raise the container's limit, or compute in --dtype bfloat16",
            )
        self._now = Batch(n_tokens // 2, self._now.kept_tokens // 2, self._now.logits_nbytes // 2)
        self.batch_tokens, self.kept_tokens, self.logits_nbytes = astuple(self._now)  # for the calls to come, too
        text = f"memory was short: from then on {n_tokens // 2} tokens were computed at a time"
        self.warnings[:] = [*self.decoder.doubts, text]
        return None

    def forward_in_memory(
        self,
        stretches: list[tuple[Segment, int, int]],
        cache: Any,
        targets: Targets,
        *,
        keep: bool,
        parents: Sequence[int] | None,
    ) -> list[Any]:
        """One forward over stretches (segment, start, stop), without padding; an error where memory is short."""
        tokens: list[int] = []
        reads: list[HeadRead] = []
        for segment, start, stop in stretches:
            shift = len(tokens) - start
            reads += [(p + shift, query, slot) for p, query, slot in segment.reads if start <= p < stop]
            tokens += segment.row[start:stop]
        left = sum(self._flop(start, stop) for _, start, stop in stretches)
        n_layers = len(self.decoder.model.blocks) if isinstance(self.decoder, Decoder) else 0
        share, n_begun = left // (n_layers + 1), 0

        def on_layer() -> None:  # so that something moves within a forward that takes minutes
            nonlocal left, n_begun
            n_begun += 1
            if left > share:
                left -= share
                self.progress.advance(share)
            # Two streams that are stopped lose one forward's work at most: what is more than half done is finished.
            if self._forwards.stop.is_set() and 2 * (n_begun - 1) <= n_layers:
                raise _StoppedError

        lengths = [stop - start for _, start, stop in stretches]
        packed = Packed(cache, lengths, parents=parents, keep=keep, on_layer=on_layer)
        ids = torch.tensor([tokens], dtype=torch.long, device=self.decoder.device)
        rows = sorted({row for row, _, _ in reads})
        if isinstance(self.decoder, Decoder) and len(rows) * _FEW_ROWS <= len(tokens):
            hidden = self.decoder.hidden(ids, packed, rows=rows)[0]
            at = {row: i for i, row in enumerate(rows)}
            reads = [(at[row], query, slot) for row, query, slot in reads]
        else:
            hidden = self.decoder.hidden(ids, cache=packed)[0]
        with self._lock:
            self.usage.forwards += 1
            self.usage.tokens += len(tokens)
        if reads:
            self._await(hidden, reads, targets)
        self.progress.advance(left)
        return [packed.segment(i) for i in range(len(stretches))] if keep else []

    def _await(self, hidden: torch.Tensor, reads: list[HeadRead], targets: Targets) -> None:
        """Read targets from hidden states [T, d], or let their rows wait for those of other forwards, if few."""
        n_rows, room = len({row for row, _, _ in reads}), min(WAITING_ROWS, self._head_rows)
        if n_rows >= room:
            self._read(hidden, reads, targets, self._head_rows)
            return
        with self._lock:
            full = WaitingRows()
            if self._waiting.n_rows + n_rows > room or self._waiting.is_late:
                full, self._waiting = self._waiting, full
            self._waiting.add(hidden, reads)
        self._read_waiting(full, targets)

    def _read_waiting(self, waiting: WaitingRows, targets: Targets) -> None:
        """Always as many rows at a time, on as many threads: both depend on the clock here, and a score must not."""
        if waiting.reads:
            hidden, n_rows = torch.cat(waiting.hidden), min(WAITING_ROWS, self._head_rows)
            with torch_threads(self._threads):
                self._read(hidden, waiting.reads, targets, n_rows, is_padded=True)

    def _read(
        self, hidden: torch.Tensor, reads: Sequence[HeadRead], targets: Targets, n_rows: int, is_padded: bool = False
    ) -> None:
        """The head sees each row once, `n_rows` at a time."""
        for rows, some in in_pieces(reads, n_rows):
            given = hidden[torch.tensor(rows, device=hidden.device)]
            if is_padded:
                given = torch.cat([given, given.new_zeros(n_rows - len(rows), *given.shape[1:])])
            logits = self.decoder.logits(given)[: len(rows)].float()
            with self._lock:
                self._n_vocab = logits.shape[-1]
                self.usage.head_rows += len(rows)
                targets.fill(logits, rows, some)

    @property
    def _head_rows(self) -> int:
        """How many rows the head is given at most."""
        if self._n_vocab is None:
            return _FIRST_ROWS
        return max(1, self._now.logits_nbytes // (4 * self._n_vocab * self._streams))


class _StoppedError(Exception):
    """Another stream has failed, or the user has interrupted."""


def _unit_of(n_flop: int) -> tuple[int, str]:
    """The unit in which this many operations are shown."""
    return (10**9, "GFLOP") if n_flop >= 10**11 else (10**6, "MFLOP") if n_flop >= 10**9 else (1, "FLOP")
