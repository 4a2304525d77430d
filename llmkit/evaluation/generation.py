"""Generating answers to lm-eval's `generate_until` requests, in left-padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.errors import InputError
from llmkit.evaluation.encoding import Encoder
from llmkit.pipeline.progress import Progress

if TYPE_CHECKING:
    import torch

    from llmkit.decoder.model import Decoder

__all__ = ["generate"]

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's order
_SEED = 1234


@dataclass
class _Task:
    """One request while it is being answered."""

    index: int
    tokens: list[int]
    stops: list[str]
    max_new: int
    temperature: float
    new: list[int] = field(default_factory=list)
    is_done: bool = False


def generate(
    decoder: Decoder,
    encoder: Encoder,
    eos_ids: Sequence[int],
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    max_length: int,
    max_new: int,
    batch_tokens: int,
    progress: Progress,
) -> list[str]:
    """The answers, in the order of the requests: text up to the first stop string or end token.

    Args:
        decoder: the model.
        encoder: its tokenizer.
        eos_ids: tokens that end a text.
        requests: prompt and lm-eval's generation arguments (until, max_gen_toks, do_sample, temperature).
        max_length: prompts lose tokens on the left so that prompt and answer fit in it.
        max_new: the longest answer where a request does not say.
        batch_tokens: prompts are batched while their padded lengths and answers stay below it.
        progress: told of answers as they are finished.
    """
    import torch

    prompts = encoder.encode([prompt for prompt, _ in requests])
    tasks = [
        _task(i, ids, arguments, encoder, max_length, max_new)
        for i, (ids, (_, arguments)) in enumerate(zip(prompts, requests, strict=True))
    ]
    answers = [""] * len(requests)
    generator = torch.Generator().manual_seed(_SEED)
    progress.begin(len(tasks), "generating", "answers")
    try:
        for batch in _batches(tasks, batch_tokens):
            _answer(decoder, encoder, eos_ids, batch, generator)
            for task in batch:
                answers[task.index] = _cut(encoder.decode(task.new), task.stops)
            progress.advance(len(batch))
    finally:
        progress.end()
    return answers


def _task(
    index: int, ids: list[int], arguments: Mapping[str, Any], encoder: Encoder, max_length: int, max_new: int
) -> _Task:
    until = arguments.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    longest = int(next((arguments[name] for name in _LENGTH_NAMES if arguments.get(name) is not None), max_new))
    if longest >= max_length:
        raise InputError(f"the task asks for {longest} new tokens, but the model takes {max_length} in all")
    temperature = float(arguments.get("temperature") or 0.0)
    samples = bool(arguments.get("do_sample", temperature > 0.0))
    return _Task(
        index=index,
        tokens=ids[-(max_length - longest) :],
        stops=[*stops, encoder.eos_text],
        max_new=longest,
        temperature=temperature if samples else 0.0,
    )


def _batches(tasks: Sequence[_Task], batch_tokens: int) -> Iterator[list[_Task]]:
    """Longest prompts first, so that neighbours need little padding."""
    batch: list[_Task] = []
    for task in sorted(tasks, key=lambda t: (-len(t.tokens), t.index)):
        widest = len(batch[0].tokens) if batch else len(task.tokens)
        answer = max(t.max_new for t in [*batch, task])
        if batch and (len(batch) + 1) * (widest + answer) > batch_tokens:
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _answer(
    decoder: Decoder, encoder: Encoder, eos_ids: Sequence[int], batch: Sequence[_Task], generator: torch.Generator
) -> None:
    """Extend every task of a batch, token by token, until all are done."""
    import torch

    from llmkit.decoder.cache import KVCache

    width = max(len(t.tokens) for t in batch)
    rows = [[0] * (width - len(t.tokens)) + t.tokens for t in batch]
    mask = torch.tensor([[0] * (width - len(t.tokens)) + [1] * len(t.tokens) for t in batch])
    cache = KVCache(width + max(t.max_new for t in batch))
    logits = decoder.logits(decoder.hidden(torch.tensor(rows), cache, mask)[:, -1])
    while True:
        picked = [_pick(row, task, generator) for row, task in zip(logits, batch, strict=True)]
        for token, task in zip(picked, batch, strict=True):
            if not task.is_done:
                _take(task, token, encoder, eos_ids)
        if all(t.is_done for t in batch):
            return
        logits = decoder.logits(decoder.hidden(torch.tensor(picked)[:, None], cache)[:, -1])


def _pick(logits: torch.Tensor, task: _Task, generator: torch.Generator) -> int:
    import torch

    if task.temperature == 0.0:
        return int(logits.argmax())
    weights = torch.softmax(logits.float().cpu() / task.temperature, -1)
    return int(torch.multinomial(weights, 1, generator=generator))


def _take(task: _Task, token: int, encoder: Encoder, eos_ids: Sequence[int]) -> None:
    if token in eos_ids:
        task.is_done = True
        return
    task.new.append(token)
    if len(task.new) >= task.max_new:
        task.is_done = True
        return
    # the stop string may be spelt by any tokens: look at the text, as far back as it can reach
    recent = encoder.decode(task.new[-(max(map(len, task.stops), default=0) + 8) :])
    task.is_done = any(stop and stop in recent for stop in task.stops)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
