"""Greedy and sampled generation, one token at a time.

The filters are those of transformers, in its order: temperature, then top-k, then top-p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.decoder.cache import KVCache
from llmkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from llmkit.decoder.model import Decoder

__all__ = ["Sampling", "filter_logits", "stream"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only this many most likely tokens; None for all.
        top_p: only the most likely tokens whose probabilities add up to this; None for all.
        seed: of the random choice.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is negative", hint="use 0 for the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top-k {self.top_k} leaves no token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} is no share between 0 and 1")


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [vocab] at the temperature, with -inf for what top-k and top-p leave out."""
    import torch

    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.numel():
        least = torch.topk(scores, sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        # As transformers: from the least likely up, drop what lies within 1 - p; the most likely one stays.
        ordered, order = torch.sort(scores, descending=False)
        dropped = torch.softmax(ordered, -1).cumsum(-1) <= 1 - sampling.top_p
        dropped[-1] = False
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -torch.inf)
    return scores


def stream(
    decoder: Decoder, prompt_ids: Sequence[int], sampling: Sampling, *, max_tokens: int, end_ids: Sequence[int] = ()
) -> Iterator[int]:
    """The tokens that follow `prompt_ids`, as they are chosen, until an end token (not given) or `max_tokens`.

    Raises:
        InputError: an empty prompt, or ids outside the vocabulary.
    """
    import torch

    if not prompt_ids:
        raise InputError("the prompt has no tokens, and the tokenizer adds none", hint="give a prompt with text in it")
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache(len(prompt_ids) + max_tokens)
    ids = torch.tensor([list(prompt_ids)])
    for _ in range(max_tokens):
        logits = decoder.logits(decoder.hidden(ids, cache)[:, -1])[0].float().cpu()
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            weights = torch.softmax(filter_logits(logits, sampling), -1)
            token = int(torch.multinomial(weights, 1, generator=generator))
        if token in end_ids:
            return
        yield token
        ids = torch.tensor([[token]])
