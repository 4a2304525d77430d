"""How the next token is chosen from its logits.

The filters are those of transformers, in its order: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.errors import InputError
from llmkit.lazy_imports import torch

_LEAST_TEMPERATURE = 1e-6  # logits divided by less are no float32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only this many most likely tokens; None or 0 for all.
        top_p: only the most likely tokens whose probabilities add up to this; None or 1 for all.
        seed: of the random choice.
        repetition_penalty: logits of tokens that stand before are divided by it where they are positive and multiplied
            where they are negative; 1 leaves them.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is negative", hint="use 0 for the most likely token")
        if self.temperature and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"temperature {self.temperature:g} is no number from {_LEAST_TEMPERATURE:g} on",
                hint="use 0 for the most likely token",
            )
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top-k {self.top_k} leaves no token", hint="use 0 for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} is no share between 0 and 1", hint="use 1 for all tokens")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition penalty {self.repetition_penalty} is not above 0", hint="use 1 for none")


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [..., vocab] at the temperature (above 0), with -inf for what top-k and top-p leave out."""
    scores = logits.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        least = torch.topk(scores, sampling.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        # As transformers: from the least likely up, drop what lies within 1 - p; the most likely one stays.
        ordered, order = torch.sort(scores, descending=False)
        dropped = torch.softmax(ordered, -1).cumsum(-1) <= 1 - sampling.top_p
        dropped[..., -1] = False
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return scores


def penalize(logits: torch.Tensor, before: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Logits [B, vocab] with the repetition penalty on the tokens that stand before in each row."""
    logits = logits.clone()
    for row, tokens in zip(logits, before, strict=True):
        ids = torch.tensor(sorted(set(tokens)), device=logits.device)
        row[ids] = torch.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    return logits


def choose_tokens(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, before: Sequence[Sequence[int]]
) -> torch.Tensor:
    """One token id [B] for each row of logits [B, vocab]; the generator lives on the CPU.

    Args:
        before: the tokens of each row so far.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, before, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    shares = torch.softmax(filter_logits(logits, sampling), -1)
    # Drawn on the CPU, so that one seed gives one text whatever the device.
    return torch.multinomial(shares.cpu(), 1, generator=generator)[:, 0].to(logits.device)
