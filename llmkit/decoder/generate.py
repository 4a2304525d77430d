"""Generation from token ids: greedy or sampled, in batches, token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from llmkit.decoder.branches import Branches
from llmkit.decoder.kv import KVCache
from llmkit.decoder.language_model import LanguageModel
from llmkit.decoder.model import Decoder
from llmkit.decoder.packed import Packed
from llmkit.decoder.sampling import Sampling, choose_tokens
from llmkit.errors import InputError
from llmkit.lazy_imports import torch

_LEFT_SHARE = 0.75  # a batch is cut to its open rows when no more than this share is open: cutting copies them
_ROOM = 4096  # new tokens that a cache has room for at once; beyond them it grows


def generate(
    decoder: LanguageModel,
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
    if not prompts or any(not p for p in prompts):
        raise InputError("nothing to continue: a prompt has no tokens", hint="give some text, or a BOS token")
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=decoder.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=decoder.device)
    texts = _Texts(len(prompts), eos, on_token)
    before = [list(prompt) for prompt in prompts]
    for tokens in _steps(decoder, ids, mask, max_new_tokens, sampling or Sampling(), before):
        texts.add(range(len(prompts)), tokens)
        if not any(texts.is_open):
            break
    return texts.tokens


def generate_from(
    decoder: Decoder,
    prefix: KVCache | None,
    tails: Sequence[Sequence[int]],
    *,
    start: Sequence[int] = (),
    batch_tokens: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """The new tokens of prompts that begin alike, as of `generate`; texts that have ended cost nothing more.

    Args:
        decoder: one that computes any growing sequence from its cache (`recompute_beyond` and `exact_sharing_limit` are
            beyond prompt and answer).
        prefix: what all prompts begin with: one sequence; None for nothing.
        tails: how each goes on, at least one token.
        start: the tokens of the prefix, which a repetition penalty looks at.
        batch_tokens: how many tokens of tails one forward takes at most, longer ones alone.
        max_new_tokens, sampling, eos, on_token: as of `generate`.
    """
    chosen, generator = sampling or Sampling(), torch.Generator().manual_seed((sampling or Sampling()).seed)
    texts = _Texts(len(tails), eos, on_token)
    passes: list[Packed] = []
    last_states = []
    for some in _side_by_side(tails, batch_tokens):
        passes.append(Packed(prefix, [len(tail) for tail in some], keep=True))
        ids = torch.tensor([[token for tail in some for token in tail]])
        last_states.append(decoder.hidden(ids, cache=passes[-1])[0, list(passes[-1].ends)])
    logits = decoder.logits(torch.cat(last_states))
    cache: Branches | None = None
    rows = list(range(len(tails)))  # the texts in the batch
    for step in range(max_new_tokens):
        before = [[*start, *tails[i], *texts.tokens[i]] for i in rows] if chosen.repetition_penalty != 1 else []
        tokens = choose_tokens(logits, chosen, generator, before).tolist()
        texts.add(rows, tokens)
        going = [at for at, i in enumerate(rows) if texts.is_open[i]]
        if not going or step + 1 == max_new_tokens:
            break
        if cache is None:
            cache = Branches(passes, max_new_tokens)
            passes.clear()
        if len(going) <= _LEFT_SHARE * len(rows):
            cache.keep(going)
            rows, tokens = [rows[at] for at in going], [tokens[at] for at in going]
        logits = decoder.next_logits(torch.tensor(tokens)[:, None], cache)
    return texts.tokens


class _Texts:
    """Texts that grow token by token, each until it ends.

    Attributes:
        tokens: of each text, without the one that ended it.
        is_open: whether it goes on.
    """

    def __init__(self, n: int, eos: Collection[int], on_token: Callable[[int, int], bool | None] | None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.is_open = [True] * n
        self._eos, self._on_token = eos, on_token

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """One more token for each of the texts `rows`; those that have ended stay as they are."""
        for i, token in zip(rows, tokens, strict=True):
            if self.is_open[i] and token in self._eos:
                self.is_open[i] = False
            elif self.is_open[i]:
                self.tokens[i].append(token)
                if self._on_token is not None and self._on_token(i, token):
                    self.is_open[i] = False


def _side_by_side(tails: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    some: list[Sequence[int]] = []
    for tail in tails:
        if some and sum(map(len, some)) + len(tail) > batch_tokens:
            yield some
            some = []
        some.append(tail)
    yield some


def stream(
    decoder: LanguageModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int,
    end_ids: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that follow one prompt, as they are chosen, until an end token (not given) or `max_tokens`.

    Raises:
        InputError: an empty prompt, or ids outside the vocabulary.
    """
    if not prompt_ids:
        raise InputError("the prompt has no tokens, and the tokenizer adds none", hint="give a prompt with text in it")
    ids = torch.tensor([list(prompt_ids)])
    for (token,) in _steps(decoder, ids, None, max_tokens, sampling, [list(prompt_ids)]):
        if token in end_ids:
            return
        yield token


def _steps(
    decoder: LanguageModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    max_tokens: int,
    sampling: Sampling,
    before: Sequence[list[int]],
) -> Iterator[list[int]]:
    """The next token of every row, step by step; `before` has the tokens of each row, and grows."""
    room = ids.shape[1] + min(max_tokens, _ROOM)
    cache, generator = decoder.new_cache(room), torch.Generator().manual_seed(sampling.seed)
    sequence = ids.to(decoder.device)
    real = torch.ones_like(sequence) if mask is None else mask
    for step in range(max_tokens):
        if step:
            sequence, real = torch.cat([sequence, ids], 1), torch.cat([real, torch.ones_like(ids)], 1)
            is_rebuilt = decoder.recompute_beyond is not None and bool(
                (real.sum(1) == decoder.recompute_beyond + 1).any()
            )
            cache, ids, mask = (decoder.new_cache(room), sequence, real) if is_rebuilt else (cache, ids, None)
        tokens = choose_tokens(decoder.next_logits(ids, cache, mask), sampling, generator, before)
        for row, token in zip(before, tokens.tolist(), strict=True):
            row.append(token)
        yield tokens.tolist()
        ids = tokens[:, None]
