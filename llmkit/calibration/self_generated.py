"""A calibration text that the model writes itself: nothing has to be found for it, and it is of the model's own kind.

Each window begins with another token, chosen at random among those that are no special ones, so that several languages
and kinds of text come up; what follows is sampled from the model.

Source: Liu et al. 2023, LLM-QAT (arXiv:2305.17888), which samples whole texts from random first tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.decoder import load_decoder
from llmkit.decoder.generate import generate
from llmkit.decoder.sampling import Sampling
from llmkit.errors import InputError
from llmkit.tensors.stopped import raise_if_stopped

_N_TOGETHER = 32
_TOP_P = 0.95
_LARGE_NBYTES = 8 << 30  # of float32 weights: beyond it the model is held in half precision


def generated_by(ckpt: Checkpoint, n: int, length: int, *, seed: int, suffix: Sequence[int]) -> list[list[int]]:
    """Windows of `length` tokens that the model writes.

    Args:
        ckpt: the model, which is held in memory as a whole for this.
        n: how many.
        seed: of the first tokens, and of what follows them.
        suffix: ids that every prompt ends with.

    Raises:
        InputError: the vocabulary has special tokens only.
        Stopped: the run was stopped.
    """
    tokenizer = load_tokenizer(ckpt)
    begin, rng = _beginning(tokenizer, suffix), random.Random(seed)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    words = [i for i in range(len(tokenizer)) if i not in special]
    if not words:
        raise InputError(f"{ckpt.label} has no tokens to begin a text with", hint="--calibration FILE")
    is_large = 4 * sum(lazy.spec.numel for lazy in ckpt.tensors.values()) > _LARGE_NBYTES
    decoder = load_decoder(ckpt, dtype="bfloat16" if is_large else "float32")

    def on_token(index: int, token: int) -> None:
        raise_if_stopped()

    rows: list[list[int]] = []
    while len(rows) < n:
        prompts = [[*begin, rng.choice(words)] for _ in range(min(_N_TOGETHER, n - len(rows)))]
        sampling = Sampling(temperature=1.0, top_p=_TOP_P, seed=seed + len(rows))
        n_new = length - len(prompts[0]) - len(suffix)
        generated = generate(decoder, prompts, max_new_tokens=n_new, sampling=sampling, on_token=on_token)
        rows += [[*prompt, *new, *suffix] for prompt, new in zip(prompts, generated, strict=True)]
    return rows


def _beginning(tokenizer: Any, suffix: Sequence[int]) -> list[int]:
    """The ids that the tokenizer puts before every text."""
    empty = [i for i in tokenizer("")["input_ids"] if i not in suffix]
    return list(empty)
