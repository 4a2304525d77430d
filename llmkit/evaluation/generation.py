"""Answers to lm-eval's `generate_until` requests: stop strings, truncation, and batches for a decoder.

Prompts are arranged in the tree of shared prefixes that scores are computed with: what prompts begin with is computed
and held once, their answers grow side by side, and an answer that is finished leaves its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

from llmkit.decoder.generate import generate, generate_from
from llmkit.decoder.kv import KVCache
from llmkit.decoder.language_model import LanguageModel
from llmkit.decoder.model import Decoder
from llmkit.decoder.packed import Packed
from llmkit.decoder.sampling import Sampling
from llmkit.errors import InputError, is_memory_error
from llmkit.evaluation.answers import KeptAnswers
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.prefix import Query, Segment, Tokens, share_prefixes
from llmkit.lazy_imports import torch
from llmkit.pipeline.progress import Progress

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's order
_SEED = 1234


Run = Callable[..., list[list[int]]]
"""Generates from one batch; takes max_new_tokens, sampling, eos and on_token as `generate` does."""

Prepare = Callable[["list[Request]"], Run]


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    Attributes:
        index: its place among the requests.
        tokens: the prompt.
        stops: texts that end the answer and are no part of it.
        max_new: the longest answer in tokens.
    """

    index: int
    tokens: Tokens
    stops: tuple[str, ...]
    max_new: int
    sampling: Sampling

    @property
    def kind(self) -> tuple[int, float, int | None, float | None, float]:
        """What all requests of a batch have in common."""
        how = self.sampling
        return self.max_new, how.temperature, how.top_k, how.top_p, how.repetition_penalty

    def cut(self, text: str) -> str:
        """The answer, without what follows its first stop string."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text


def read_requests(
    encoder: Encoder,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    stops: Sequence[str] = (),
    max_length: int,
    max_new: int,
) -> list[Request]:
    """Prompts as token ids, and lm-eval's generation arguments (until, max_gen_toks, do_sample, temperature, …).

    Args:
        encoder: the tokenizer.
        requests: prompt and arguments.
        stops: texts that end an answer besides those of the request.
        max_length: prompts lose tokens on the left so that prompt and answer fit in it.
        max_new: the longest answer where a request does not say.

    Raises:
        InputError: a request asks for more new tokens than the model takes.
    """
    prompts = encoder.encode([prompt for prompt, _ in requests])
    return [
        _read(index, ids, arguments, (*stops, encoder.eos_text), max_length, max_new)
        for index, (ids, (_, arguments)) in enumerate(zip(prompts, requests, strict=True))
    ]


def _read(
    index: int, ids: Sequence[int], arguments: Mapping[str, Any], always: Sequence[str], max_length: int, max_new: int
) -> Request:
    until = arguments.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    longest = int(next((arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None), max_new))
    if longest >= max_length:
        raise InputError(
            f"the task asks for {longest} new tokens, but the model takes {max_length} in all",
            hint="a larger --max-length, where the model has the context for it",
        )
    temperature = float(arguments.get("temperature") or 0.0)
    if not arguments.get("do_sample", temperature > 0.0):
        temperature = 0.0
    top_k, top_p = int(arguments.get("top_k") or 0), float(arguments.get("top_p") or 1.0)
    return Request(
        index=index,
        tokens=tuple(ids[-(max_length - longest) :]),
        stops=tuple(stop for stop in (*stops, *always) if stop),
        max_new=longest,
        sampling=Sampling(temperature, top_k, top_p, _SEED, float(arguments.get("repetition_penalty") or 1.0)),
    )


class Generator:
    """Answers requests with a decoder.

    Args:
        decoder: the model.
        encoder: its tokenizer.
        eos_ids: tokens that end a text.
        batch_tokens: how many tokens one forward takes at most.
        kept_tokens: as many answers grow side by side as have room in it, prompts that are not shared included.
        forward_cost: as for `share_prefixes`.
        progress: told of answers as they are finished.

    Attributes:
        warnings: what the user should know: memory was short.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        encoder: Encoder,
        eos_ids: Sequence[int],
        *,
        batch_tokens: int,
        kept_tokens: int,
        forward_cost: int,
        progress: Progress,
    ) -> None:
        self._decoder, self._encoder, self._eos = decoder, encoder, frozenset(eos_ids)
        self._batch_tokens, self._kept_tokens, self._forward_cost = batch_tokens, kept_tokens, forward_cost
        self._progress = progress
        self.warnings: list[str] = []

    def answer(self, requests: Sequence[Request], kept: KeptAnswers) -> list[str]:
        """The answers, in the order of the requests: text up to the first stop string or end token.

        Args:
            requests: `index` counts them.
            kept: where answers are kept; those found there are not generated again.

        Raises:
            InputError: a prompt without tokens.
        """
        if any(not request.tokens for request in requests):
            raise InputError("nothing to continue: a prompt has no tokens", hint="give some text, or a BOS token")
        self._progress.begin(len(requests), "generating", "answers")
        try:
            with torch.inference_mode():
                for _, group in groupby(sorted(requests, key=lambda r: (r.kind, r.index)), key=lambda r: r.kind):
                    for batch, prepare in self._batches(list(group)):
                        if any(request.index not in kept.texts for request in batch):
                            kept.add_texts(self._in_memory(batch, prepare))
                        self._progress.advance(len(batch))
        finally:
            self._progress.end()
        return [kept.texts[request.index] for request in requests]

    def _in_memory(self, batch: list[Request], prepare: Prepare) -> dict[int, str]:
        """The answers of a batch; of its halves where memory is short."""
        try:
            return self._texts(batch, prepare(batch))
        except Exception as error:
            if not is_memory_error(error) or len(batch) == 1:
                raise
        # here, as the error held the tensors
        middle = len(batch) // 2
        self.warnings[:] = [f"memory was short: answers were generated {middle} at a time"]
        self._kept_tokens //= 2
        return self._in_memory(batch[:middle], prepare) | self._in_memory(batch[middle:], prepare)

    def _batches(self, group: list[Request]) -> Iterator[tuple[list[Request], Prepare]]:
        """Requests of one kind, and what makes a batch of them ready to generate."""
        longest = max(len(r.tokens) + r.max_new for r in group)
        limit = self._decoder.exact_sharing_limit
        if isinstance(self._decoder, Decoder) and (limit is None or longest <= limit):
            yield from self._of_tree(self._decoder, group)
            return
        for batch in _rows(group, 0, self._batch_tokens):
            yield batch, lambda some: partial(generate, self._decoder, [request.tokens for request in some])

    def _of_tree(self, decoder: Decoder, group: list[Request]) -> Iterator[tuple[list[Request], Prepare]]:
        """Batches that each continue one shared prefix, depth first: the caches alive are those of one path.

        What is shared has answers of its own batch, and so costs up to as many forwards more as they are long.
        """
        # The last token of a prompt is never shared: the answer begins with its logits.
        queries = [Query(r.tokens[:-1], (0,)) for r in group if len(r.tokens) > 1]
        many = [r for r in group if len(r.tokens) > 1]
        worth = self._forward_cost * group[0].max_new
        roots = share_prefixes(queries, worth)
        direct: dict[int, list[Request]] = {id(None): [r for r in group if len(r.tokens) == 1]}
        pending = list(roots)
        while pending:
            segment = pending.pop()
            for _, index, _ in segment.reads:
                owner: Segment | None = segment
                while owner is not None and (owner.stop >= len(many[index].tokens) or not _is_shared(owner, worth)):
                    owner = owner.parent
                direct.setdefault(id(owner), []).append(many[index])
            pending += segment.children
        level: list[tuple[_Prefix | None, list[Segment]]] = [(None, roots)]
        while level:
            prefix, segments = level.pop()
            stop = prefix.segment.stop if prefix else 0
            some = direct.get(id(prefix.segment if prefix else None), [])
            for batch in _rows(some, stop, self._kept_tokens):
                yield batch, partial(self._run, decoder, prefix)
            shared = [s for s in segments if _is_shared(s, worth)]
            level += [(_Prefix(decoder, s, prefix, self._batch_tokens), s.children) for s in shared]

    def _run(self, decoder: Decoder, prefix: _Prefix | None, batch: list[Request]) -> Run:
        if len(batch) == 1 and len(batch[0].tokens) - (prefix.segment.stop if prefix else 0) > self._batch_tokens:
            row = batch[0].tokens  # read piece by piece
            long = Segment(row, len(row) - 1, parent=prefix.segment if prefix else None)
            prefix = _Prefix(decoder, long, prefix, self._batch_tokens)
        stop = prefix.segment.stop if prefix else 0
        tails, start = [request.tokens[stop:] for request in batch], batch[0].tokens[:stop]
        # the cache is computed when the batch is: an interrupted run may have answered it
        return lambda **options: generate_from(
            decoder, prefix.cache if prefix else None, tails, start=start, batch_tokens=self._batch_tokens, **options
        )

    def _texts(self, batch: Sequence[Request], run: Run) -> dict[int, str]:
        written: list[list[int]] = [[] for _ in batch]
        reach = [max(map(len, request.stops), default=0) + 8 for request in batch]

        def is_over(i: int, token: int) -> bool:
            written[i].append(token)
            # a stop string may be spelt by any tokens: look at the text, as far back as it can reach
            recent = self._encoder.decode(written[i][-reach[i] :])
            return any(stop in recent for stop in batch[i].stops)

        first = batch[0]
        made = run(max_new_tokens=first.max_new, sampling=first.sampling, eos=self._eos, on_token=is_over)
        return {r.index: r.cut(self._encoder.decode(ids)) for r, ids in zip(batch, made, strict=True)}


def _is_shared(segment: Segment, worth: int) -> bool:
    """Whether several prompts go on from it: others below it, or the same one again."""
    return bool(segment.children) or (len(segment.reads) - 1) * len(segment) > worth


class _Prefix:
    """What some prompts begin with; its keys and values are computed when they are asked for."""

    def __init__(self, decoder: Decoder, segment: Segment, parent: _Prefix | None, batch_tokens: int) -> None:
        self.segment = segment
        self._decoder, self._parent, self._batch_tokens = decoder, parent, batch_tokens

    @cached_property
    def cache(self) -> KVCache:
        """Of all tokens up to the end of the segment."""
        cache = self._parent.cache if self._parent else None
        for start in range(self.segment.start, self.segment.stop, self._batch_tokens):
            tokens = self.segment.row[start : min(start + self._batch_tokens, self.segment.stop)]
            packed = Packed(cache, [len(tokens)], keep=True)
            self._decoder.hidden(torch.tensor([tokens]), cache=packed)
            cache = packed.segment(0)
        if cache is None:
            raise ValueError("a prefix has tokens")
        return cache


def _rows(requests: Sequence[Request], start: int, kept_tokens: int) -> Iterator[list[Request]]:
    """Requests with the longest prompts first, as many as there is room for with their tokens from `start` padded."""
    batch: list[Request] = []
    for request in sorted(requests, key=lambda r: (-len(r.tokens), r.index)):
        if batch:
            rows, longest = len(batch) + 1, len(batch[0].tokens) - start
            if rows * (longest + request.max_new) > kept_tokens:
                yield batch
                batch = []
        batch.append(request)
    if batch:
        yield batch
