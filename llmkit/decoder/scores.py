"""How attention scores are made of queries and keys, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    # Positions [B, T] of keys -> what is added to the scores of every query, [B, heads, T] float32.
    KeyBias = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["Scores"]


@dataclass(frozen=True, slots=True)
class Scores:
    """score = cap(q.k * scale) + key_bias, for the keys that a query sees; float32.

    Attributes:
        scale: multiplies the products.
        softcap: cap(x) = c * tanh(x / c); None for x.
        window: a query sees the last `window` keys, its own included; None for all before it.
        key_bias: a bias for each key by its position (ALiBi).
        prefix: [B] int64, keys at positions below it are seen by every query (prefix-LM); None for causal.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    key_bias: KeyBias | None = None
    prefix: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True when there is nothing but the scale and causality."""
        return self.softcap is None and self.window is None and self.key_bias is None and self.prefix is None

    def over(self, n_keys: int) -> Scores:
        """The same over `n_keys` keys: a window that hides none of them is none."""
        return replace(self, window=None) if self.window is not None and n_keys <= self.window else self
