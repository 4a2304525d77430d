"""The order of forwards: which segments are computed together, and in how many streams beside each other.

On a CPU two streams with half of the threads each are faster than one with all: what lies between the products runs
side by side too, and no operation waits for a team of threads. What is computed together, and by how many threads,
follows from the tree alone, never from the clock, so that scores are the same each time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Condition, Event
from typing import Any, TypeAlias

from llmkit.evaluation.cost import Batch
from llmkit.evaluation.prefix import Segment, count_tokens, pack
from llmkit.lazy_imports import torch
from llmkit.pipeline.pool import run_all, threads_each

STREAMS = 2
_WAIT_S = 0.1  # until a stream that has nothing to do looks whether it shall stop

Work: TypeAlias = tuple[list[Segment], Any, bool]
"""Segments, the cache that they continue, whether theirs are kept."""
Compute: TypeAlias = "Callable[[list[Segment], Any, bool], list[Any]]"
"""A `Work` -> the caches of its segments, if kept; none where nothing below them is to be computed."""


def n_streams(device: torch.device) -> int:
    """How many streams of forwards there are to be on a device, with the threads that torch has now."""
    return STREAMS if device.type == "cpu" and torch.get_num_threads() % STREAMS == 0 else 1


@dataclass(slots=True)
class _Group:
    """Segments that continue one cache: such that are computed with all that is below them, or whose own caches are
    kept, not both.

    Attributes:
        limit: the tokens of a forward, at most; None for those of a batch.
    """

    segments: list[Segment]
    cache: Any
    keep: bool
    limit: int | None = None


class Forwards:
    """All segments of some trees, depth first: the caches alive are those of one path and its siblings in one batch.

    Args:
        roots: of the trees.
        compute: computes segments that continue one cache; called from several threads.
        most: what one forward computes and all of them hold, at most; asked for before each.
        streams: forwards beside each other.
        joins: whether one forward may compute segments and what continues them, where it holds them all.
    """

    def __init__(
        self, roots: list[Segment], compute: Compute, most: Callable[[], Batch], streams: int, *, joins: bool = False
    ) -> None:
        self._compute, self._most, self._streams, self._joins = compute, most, streams, joins
        self._groups: list[_Group] = []
        self._n_running = 0
        self._change = Condition()
        self.stop = Event()
        self._push(roots, None)

    def run(self) -> None:
        """Compute them. What is thrown first is raised; `stop` is set then, and streams end at the next layer."""
        while self._groups and (self._streams == 1 or self._is_lone()):
            work = self._pop(1)
            self._done(work, self._compute(*work))
        if self._groups:
            with threads_each(self._streams, torch.get_num_threads() // self._streams) as pool:
                run_all(pool, self._stream, range(self._streams), self.stop)

    def _is_lone(self) -> bool:
        """Whether all that can be computed now is one batch, for which all threads are taken then."""
        return len(self._groups) == 1 and len(self._first(self._groups[0], 1)) == len(self._groups[0].segments)

    def _stream(self, number: int) -> None:
        with torch.inference_mode():
            while (work := self._next()) is not None:
                caches = self._compute(*work)
                with self._change:
                    self._n_running -= 1
                    self._done(work, caches)
                    self._change.notify_all()

    def _next(self) -> Work | None:
        """What a stream computes next; waits while only another one can bring more. None at the end."""
        with self._change:
            while not self.stop.is_set():
                if self._groups:
                    self._n_running += 1
                    return self._pop(self._streams)
                if not self._n_running:
                    break
                self._change.wait(_WAIT_S)
            return None

    def _pop(self, shared_by: int) -> Work:
        group = self._groups.pop()
        batch = self._first(group, shared_by)
        if rest := group.segments[len(batch) :]:
            self._groups.append(_Group(rest, group.cache, group.keep, group.limit))
        return batch, group.cache, group.keep

    def _first(self, group: _Group, shared_by: int) -> list[Segment]:
        most = self._most()
        n_tokens = most.tokens if group.limit is None else min(most.tokens, group.limit)
        batch = next(pack(group.segments, n_tokens, whole=not group.keep))
        return _affordable(batch, most.kept_tokens // shared_by) if group.keep else batch

    def _done(self, work: Work, caches: Sequence[Any]) -> None:
        for segment, cache in zip(work[0], caches, strict=False):
            self._push(segment.children, cache)

    def _push(self, segments: Iterable[Segment], cache: Any) -> None:
        most = self._most().tokens
        whole: list[Segment] = []
        inner: list[Segment] = []
        for segment in segments:
            is_whole = not segment.children or (self._joins and count_tokens([segment]) <= most)
            (whole if is_whole else inner).append(segment)
        if inner:
            self._groups.append(_Group(inner, cache, keep=True))
        if whole:
            self._groups.append(_Group(whole, cache, False, self._even(whole)))

    def _even(self, whole: Sequence[Segment]) -> int | None:
        """The tokens of a forward with which every stream gets as many forwards, all of a size."""
        lengths = [count_tokens([s]) for s in whole]
        n = -(-sum(lengths) // self._most().tokens)
        if self._streams == 1 or n == 1:
            return None
        n += -n % self._streams
        return -(-sum(lengths) // n) + max(lengths) // 2


def _affordable(batch: list[Segment], n_tokens: int) -> list[Segment]:
    """The first segments of `batch`, at least one, whose caches together hold at most `n_tokens`."""
    held = list(accumulate(s.stop for s in batch))
    return batch[: max(1, bisect_right(held, n_tokens))]
