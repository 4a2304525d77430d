"""How the next token is chosen from its logits.

The filters are those of transformers, in its order: temperature, then top-k, then top-p.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.errors import InputError
from llmkit.lazy_imports import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only this many most likely tokens; None or 0 for all.
        top_p: only the most likely tokens whose probabilities add up to this; None or 1 for all.
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
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top-k {self.top_k} leaves no token", hint="use 0 for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} is no share between 0 and 1", hint="use 1 for all tokens")


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


def choose_tokens(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token id [B] for each row of logits [B, vocab]; the generator lives on the CPU."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    shares = torch.softmax(filter_logits(logits, sampling), -1)
    # Drawn on the CPU, so that one seed gives one text whatever the device.
    return torch.multinomial(shares.cpu(), 1, generator=generator)[:, 0].to(logits.device)
