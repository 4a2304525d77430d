"""The layer of RWKV-4: a time mix and a channel mix, each of a token with the one before it.

State of a layer, five of [B, hidden] float32: the last token as the channel mix and as the time mix saw it, and
numerator, denominator and largest exponent of the weighted mean. Source: the paper, and BlinkDL/ChatRWKV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.decoder.kv import Cache
    from llmkit.decoder.states import State

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

    def run(x: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        if state is None:
            empty = x.new_zeros((x.shape[0], x.shape[2]), dtype=torch.float32)
            state = empty, empty, empty, empty, torch.full_like(empty, SMALLEST)
        y = norms[0](x)
        before, last_y = shifted(y, state[1], real)
        k, v, r = (
            product[m](y * mixes[n] + before * (1 - mixes[n]))
            for n, m in (("key", "k"), ("value", "v"), ("receptance", "r"))
        )
        mean, held = _weighted_mean(k.float(), v.float(), decay, first, state[2:], real)
        x = x + product["o"](r.sigmoid() * mean.to(x.dtype))
        z = norms[1](x)
        before, last_z = shifted(z, state[0], real)
        key = product["key"](z * channel["key"] + before * (1 - channel["key"])).relu().square()
        gate = product["receptance"](z * channel["receptance"] + before * (1 - channel["receptance"])).sigmoid()
        x = x + gate * product["value"](key)
        return x, (last_z, last_y, *held)

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        return cache.recur(index, run, x)

    return layer


def shifted(y: torch.Tensor, last: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The token before each one, and the last one in float32; `last` [B, hidden] is the past's."""
    from llmkit.decoder.states import last_tokens

    whole = torch.cat([last[:, None].to(y.dtype), y], 1)
    return whole[:, :-1], last_tokens(whole, 1, real)[:, 0].float()


def empty_state(x: torch.Tensor, n_heads: int, width: int) -> State:
    """What later versions hold before the first token of x [B, S, hidden]: two tokens, and a matrix for each head."""
    n, _, hidden = x.shape
    token = x.new_zeros(n, hidden, dtype=torch.float32)
    return token, token, x.new_zeros(n, n_heads, width, width, dtype=torch.float32)


def _weighted_mean(
    k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, first: torch.Tensor, state: State, real: torch.Tensor | None
) -> tuple[torch.Tensor, State]:
    """The mean of values weighted by exp(key), decaying with distance; token by token, exponents kept below zero."""
    above, below, largest = state
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
    return out, (above, below, largest)
