"""Answers to lm-eval's `generate_until` requests: batches for the decoder, stop strings, truncation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.decoder.generate import generate
from llmkit.decoder.language_model import LanguageModel
from llmkit.decoder.sampling import Sampling
from llmkit.errors import InputError
from llmkit.evaluation.answers import Answers
from llmkit.evaluation.encoding import Encoder
from llmkit.pipeline.progress import Progress

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's order
_SEED = 1234


@dataclass(frozen=True)
class _Request:
    """One prompt and how it is to be answered."""

    index: int
    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    max_new: int
    sampling: Sampling

    @property
    def kind(self) -> tuple[int, float, int | None, float | None]:
        """What all requests of a batch have in common."""
        return self.max_new, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p


def answer_requests(
    decoder: LanguageModel,
    encoder: Encoder,
    eos_ids: Sequence[int],
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    stops: Sequence[str] = (),
    max_length: int,
    max_new: int,
    batch_tokens: int,
    progress: Progress,
    answers: Answers | None = None,
) -> list[str]:
    """The answers, in the order of the requests: text up to the first stop string or end token.

    Args:
        decoder: the model.
        encoder: its tokenizer.
        eos_ids: tokens that end a text.
        requests: prompt and lm-eval's generation arguments (until, max_gen_toks, do_sample, temperature, …).
        stops: texts that end an answer besides those of the request.
        max_length: prompts lose tokens on the left so that prompt and answer fit in it.
        max_new: the longest answer where a request does not say.
        batch_tokens: prompts are batched while their padded lengths and answers stay below it.
        progress: told of answers as they are finished.
        answers: where what is generated is kept; answers found there are not generated again.

    Raises:
        InputError: a request asks for more new tokens than the model takes.
    """
    prompts = encoder.encode([prompt for prompt, _ in requests])
    read = [
        _read(index, ids, arguments, (*stops, encoder.eos_text), max_length, max_new)
        for index, (ids, (_, arguments)) in enumerate(zip(prompts, requests, strict=True))
    ]
    kept = (answers or Answers()).of_prompts((r.tokens, r.stops, r.max_new, r.sampling) for r in read)
    replies = [""] * len(requests)
    progress.begin(len(read), "generating", "answers")
    try:
        for batch in _batches(read, batch_tokens):
            if all(request.index in kept.texts for request in batch):
                texts = [kept.texts[request.index] for request in batch]
            else:
                texts = _answer(decoder, encoder, eos_ids, batch)
                kept.add_texts({request.index: text for request, text in zip(batch, texts, strict=True)})
            for request, text in zip(batch, texts, strict=True):
                replies[request.index] = text
            progress.advance(len(batch))
    finally:
        progress.end()
    return replies


def _read(
    index: int, ids: Sequence[int], arguments: Mapping[str, Any], always: Sequence[str], max_length: int, max_new: int
) -> _Request:
    until = arguments.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    longest = int(next((arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None), max_new))
    if longest >= max_length:
        raise InputError(f"the task asks for {longest} new tokens, but the model takes {max_length} in all")
    temperature = float(arguments.get("temperature") or 0.0)
    if not arguments.get("do_sample", temperature > 0.0):
        temperature = 0.0
    top_k, top_p = int(arguments.get("top_k") or 0), float(arguments.get("top_p") or 1.0)
    return _Request(
        index=index,
        tokens=tuple(ids[-(max_length - longest) :]),
        stops=tuple(stop for stop in (*stops, *always) if stop),
        max_new=longest,
        sampling=Sampling(temperature, top_k, top_p, _SEED),
    )


def _batches(requests: Sequence[_Request], batch_tokens: int) -> Iterator[list[_Request]]:
    """Requests of one kind together, longest prompts first, so that neighbours need little padding."""
    batch: list[_Request] = []
    for request in sorted(requests, key=lambda r: (r.kind, -len(r.tokens), r.index)):
        fits = batch and (len(batch) + 1) * (len(batch[0].tokens) + request.max_new) <= batch_tokens
        if batch and not (fits and request.kind == batch[0].kind):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _answer(decoder: LanguageModel, encoder: Encoder, eos_ids: Sequence[int], batch: Sequence[_Request]) -> list[str]:
    written: list[list[int]] = [[] for _ in batch]

    def is_over(i: int, token: int) -> bool:
        written[i].append(token)
        # a stop string may be spelt by any tokens: look at the text, as far back as it can reach
        recent = encoder.decode(written[i][-(max(map(len, batch[i].stops), default=0) + 8) :])
        return any(stop in recent for stop in batch[i].stops)

    generated = generate(
        decoder,
        [request.tokens for request in batch],
        max_new_tokens=batch[0].max_new,
        sampling=batch[0].sampling,
        eos=eos_ids,
        on_token=is_over,
    )
    return [_cut(encoder.decode(ids), request.stops) for ids, request in zip(generated, batch, strict=True)]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
