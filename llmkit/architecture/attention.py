"""The attention kinds."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.architecture.keys import Computed, Flag, Key, Number
from llmkit.architecture.kind import Kind, SlotShape, linear_slots, under

__all__ = ["GroupedQuery"]


@dataclass(frozen=True)
class GroupedQuery(Kind):
    """Causal softmax attention, each key/value head shared by heads/kv_heads query heads (Ainslie et al. 2023).

    One group for all heads is multi-query, a group for each head is multi-head attention.

    Attributes:
        scale: multiplies the scores; None means 1/sqrt(head_dim).
        softcap: scores become c * tanh(score / c) before the mask (Gemma team 2024); None for none.
        window: a query sees the last `window` tokens, itself included; None for all.
        qk_norm: normalises each head of queries and keys before positions are applied; None for none.
    """

    string_keys = ("qkv_bias", "out_bias")

    qkv_bias: Flag = False
    out_bias: Flag = False
    scale: Number | None = None
    softcap: Number | None = None
    window: Key | Computed | int | None = None
    qk_norm: Kind | None = None

    def slots(self) -> dict[str, SlotShape]:
        slots = {
            **linear_slots("q", "heads*head_dim", "hidden", self.qkv_bias),
            **linear_slots("k", "kv_heads*head_dim", "hidden", self.qkv_bias),
            **linear_slots("v", "kv_heads*head_dim", "hidden", self.qkv_bias),
            **linear_slots("o", "hidden", "heads*head_dim", self.out_bias),
        }
        if self.qk_norm is not None:
            slots |= under("q_norm", self.qk_norm) | under("k_norm", self.qk_norm)
        return slots
