"""Generation from token ids: greedy or sampled, in batches, token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.decoder.kv import KVCache
from llmkit.decoder.model import Decoder
from llmkit.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Sampling", "eos_ids", "generate"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach p; 1 keeps all.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}: expected temperature >= 0, "
                "top-k >= 0 and 0 < top-p <= 1"
            )


def eos_ids(*configs: object) -> tuple[int, ...]:
    """The ids that end a text, by the first config (generation_config.json, config.json) that names any."""
    for config in configs:
        found = config.get("eos_token_id") if isinstance(config, dict) else None
        if found is not None:
            return tuple(int(i) for i in found) if isinstance(found, list) else (int(found),)
    return ()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the one that ended it.

    Args:
        decoder: the model.
        prompts: token ids of each prompt; shorter ones are padded on the left.
        max_new_tokens: at most this many for each prompt.
        sampling: greedy when not given.
        eos: ids that end a text.
        on_token: called with (index of the prompt, token) as each token is chosen; True ends that prompt's text.

    Raises:
        InputError: an empty prompt.
    """
    import torch

    if not prompts or any(not p for p in prompts):
        raise InputError("nothing to continue: a prompt has no tokens", hint="give some text, or a BOS token")
    how = sampling or Sampling()
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=decoder.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=decoder.device)
    cache = KVCache(longest + max_new_tokens)
    generator = torch.Generator(device=decoder.device).manual_seed(how.seed)
    texts: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    with torch.inference_mode():
        hidden = decoder.hidden(ids, cache, mask)
        for step in range(max_new_tokens):
            tokens = _chosen(decoder.logits(hidden[:, -1]), how, generator)
            for i, token in enumerate(tokens.tolist()):
                if is_open[i] and token in eos:
                    is_open[i] = False
                elif is_open[i]:
                    texts[i].append(token)
                    if on_token is not None and on_token(i, token):
                        is_open[i] = False
            if not any(is_open) or step == max_new_tokens - 1:
                break
            hidden = decoder.hidden(tokens[:, None], cache)
    return texts


def _chosen(logits: torch.Tensor, how: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of logits [B, vocab]."""
    import torch

    if how.temperature == 0:
        return logits.argmax(-1)
    scaled = logits / how.temperature
    if 0 < how.top_k < scaled.shape[-1]:
        least = scaled.topk(how.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    shares = scaled.softmax(-1)
    if how.top_p < 1:
        ordered, order = shares.sort(-1, descending=True)
        # A token is dropped when those before it already reach p; the first always stays.
        ordered[ordered.cumsum(-1) - ordered >= how.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(-1, order, ordered)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]
