"""Scaled dot-product attention in the shapes the caches need, each on the fastest path torch has for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["attend_causal", "attend_masked", "attend_plain"]


def attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Every query sees every key. q [B, N, S, H]; k, v [B, K, T, H]; K divides N."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, length, width = q.shape
    if heads == k.shape[1]:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    # Without a mask the queries of one group are just more queries of its key/value head: no key is repeated.
    folded = q.reshape(batch, k.shape[1], -1, width)
    return scaled_dot_product_attention(folded, k, v, scale=scale).view(batch, heads, length, width)


def attend_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The S queries are the last of the T keys; each sees the keys up to its own."""
    from torch.nn.functional import scaled_dot_product_attention

    k, v = _widened(k, v, q.shape[1])
    if q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return scaled_dot_product_attention(q, k, v, attn_mask=_lower_right(q, k), scale=scale)


def attend_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """A query sees the keys for which `visible` [B, 1, S, T] is True."""
    from torch.nn.functional import scaled_dot_product_attention

    k, v = _widened(k, v, q.shape[1])
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def _widened(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values repeated for the query heads of their group."""
    times = heads // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def _lower_right(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    import torch

    new, total = q.shape[2], k.shape[2]
    return torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
