"""The layer of RWKV-4: a time mix and a channel mix, each of a token with the one before it.

State of a layer, [B, 5, hidden] float32: the last token as the channel mix and as the time mix saw it, and numerator,
denominator and largest exponent of the weighted mean. Source: the paper, and BlinkDL/ChatRWKV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.decoder.kv import Cache

    from .kind import TimeAndChannelMix

SMALLEST = -1e38  # the largest exponent before the first token


def build_layer(kind: TimeAndChannelMix, weights: Weights, index: int) -> Layer:
    """The layer of the torch decoder: (x [B, S, hidden], positions' table, cache) -> x."""
    from llmkit.decoder.linear import linear
    from llmkit.decoder.norms import build_norm

    attn, mlp = weights.under("attn"), weights.under("mlp")
    norms = [build_norm(kind.norm, weights.under(name)) for name in ("attn_norm", "mlp_norm")]
    product = {n: linear(attn, n) for n in ("k", "v", "r", "o")}
    product |= {n: linear(mlp, n) for n in ("key", "value", "receptance")}
    mixes = {n: attn(f"mix_{n}").view(-1) for n in ("key", "value", "receptance")}
    channel = {n: mlp(f"mix_{n}").view(-1) for n in ("key", "receptance")}
    decay, first = -attn("decay").float().exp(), attn("first").float()

    def run(x: torch.Tensor, state: torch.Tensor | None, real: torch.Tensor | None) -> Any:
        if state is None:
            state = x.new_zeros((x.shape[0], 5, x.shape[2]), dtype=torch.float32)
            state[:, 4] = SMALLEST
        earlier = None if real is None else _earlier(real)
        y = norms[0](x)
        before, last_y = _shifted(y, state[:, 1], earlier)
        k, v, r = (
            product[m](y * mixes[n] + before * (1 - mixes[n]))
            for n, m in (("key", "k"), ("value", "v"), ("receptance", "r"))
        )
        mean, held = _weighted_mean(k.float(), v.float(), decay, first, state[:, 2:], real)
        x = x + product["o"](r.sigmoid() * mean.to(x.dtype))
        z = norms[1](x)
        before, last_z = _shifted(z, state[:, 0], earlier)
        key = product["key"](z * channel["key"] + before * (1 - channel["key"])).relu().square()
        gate = product["receptance"](z * channel["receptance"] + before * (1 - channel["receptance"])).sigmoid()
        x = x + gate * product["value"](key)
        return x, torch.cat([last_z.float(), last_y.float(), held], 1)

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        return cache.recur(index, run, x)

    return layer


def _earlier(real: torch.Tensor) -> torch.Tensor:
    """[B, S + 1]: the token before each one and before what comes next, counted from 1; 0 for the past's last one."""
    count = torch.arange(1, real.shape[1] + 1, device=real.device)
    return torch.nn.functional.pad((real * count).cummax(-1).values, (1, 0))


def _shifted(y: torch.Tensor, last: torch.Tensor, earlier: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The token before each one, and the last one; `last` [B, hidden] is the past's."""
    extended = torch.cat([last[:, None].to(y.dtype), y], 1)
    shifted = extended if earlier is None else extended.take_along_dim(earlier[..., None], 1)
    return shifted[:, :-1], shifted[:, -1:]


def _weighted_mean(
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    first: torch.Tensor,
    state: torch.Tensor,
    real: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of values weighted by exp(key), decaying with distance; token by token, exponents kept below zero."""
    above, below, largest = state.unbind(1)
    out = torch.empty_like(k)
    for t in range(k.shape[1]):
        key, value = k[:, t], v[:, t]
        top = torch.maximum(largest, first + key)
        old, new = (largest - top).exp(), (first + key - top).exp()
        out[:, t] = (old * above + new * value) / (old * below + new)
        top = torch.maximum(largest + decay, key)
        old, new = (largest + decay - top).exp(), (key - top).exp()
        after = old * above + new * value, old * below + new, top
        if real is None:
            above, below, largest = after
        else:
            is_real = real[:, t, None]
            held = (above, below, largest)
            above, below, largest = (torch.where(is_real, a, h) for a, h in zip(after, held, strict=True))
    return out, torch.stack([above, below, largest], 1)
