"""How attention scores are made of queries and keys, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from llmkit.architecture.attention import ScoreRule
from llmkit.decoder.selection import Selection
from llmkit.lazy_imports import torch

# Positions [B, T] of keys -> what is added to the scores of every query, [B, heads, T] float32.
KeyBias: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Scores(ScoreRule):
    """score = cap(q.k * scale) + key_bias, for the keys that a query sees; float32.

    Attributes:
        key_bias: a bias for each key by its position (ALiBi).
        prefix: [B] int64, keys at positions below it are seen by every query (prefix-LM); None for causal.
        selection: which of those keys a query sees, by scores of their own; None for all.
        sinks: [heads], a score of each head that counts in the sum of its softmax and has no value; None for none.
    """

    key_bias: KeyBias | None = None
    prefix: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    selection: Selection | None = None

    @property
    def is_plain(self) -> bool:
        """True when there is nothing but the scale and causality."""
        beside = self.softcap, self.window, self.chunk, self.key_bias, self.prefix, self.sinks, self.selection
        return all(x is None for x in beside)

    def over(self, n_keys: int) -> Scores:
        """The same over `n_keys` keys: a window, a chunk or a choice that hides none of them is none."""
        window, chunk = (x if x is None or n_keys > x else None for x in (self.window, self.chunk))
        selection = self.selection if self.selection is None or n_keys > self.selection.top_k else None
        if (window, chunk, selection) == (self.window, self.chunk, self.selection):
            return self
        return replace(self, window=window, chunk=chunk, selection=selection)

    def of(self, cut: slice) -> Scores:
        """The same for some of the new tokens."""
        return self if self.selection is None else replace(self, selection=self.selection.of(cut))
