"""The layer of RWKV-7: a time mix by a generalised delta rule, and a channel mix, each with the token before.

For each head, with the state S [values, keys] and what a token gives (r receptance, w decay, k key, v value, a rate,
and u, the unit vector of a scaled key):

    S_t = S_{t-1} (diag(w_t) - u_t (a_t u_t)^T) + v_t k_t^T,   o_t = S_t r_t

State of a layer: the last token as the time mix and as the channel mix saw it, [B, hidden] float32 each, and S,
[B, heads, head_dim, head_dim] float32. Source: the paper, and BlinkDL/RWKV-LM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.lazy_imports import torch

from .mix import empty_state, shifted

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.kv import Cache
    from llmkit.decoder.states import State

    from .v7_kind import GeneralizedDelta

MIXED = ("r", "w", "k", "v", "a", "g")
"""What is made of a token and the one before it: receptance, decay, key, value, rate, gate."""
SLOWEST = math.exp(-0.5)  # decays are above exp(-exp(-0.5))


def build_layer(kind: GeneralizedDelta, dims: Sizes, weights: Weights, index: int) -> Layer:
    """The layer of the torch decoder: (x [B, S, hidden], a table for the first layer's values, cache) -> x."""
    from torch.nn.functional import group_norm, normalize

    from llmkit.decoder.linear import linear
    from llmkit.decoder.norms import build_norm

    attn, mlp = weights.under("attn"), weights.under("mlp")
    attn_norm, mlp_norm = (build_norm(kind.norm, weights.under(name)) for name in ("attn_norm", "mlp_norm"))
    product = {name: linear(attn, name) for name in ("r", "k", "v", "o")}
    low = {n: (linear(attn, f"{n}_down"), linear(attn, f"{n}_up")) for n in MIXED if attn.has(f"{n}_down.weight")}
    key, value = linear(mlp, "key"), linear(mlp, "value")
    mixes, channel = {name: attn(f"mix_{name}").view(-1) for name in MIXED}, mlp("mix_k")
    unit_scale, key_scale, bonus = attn("k_k"), attn("k_a"), attn("r_k").view(-1)
    norm_weight, norm_bias = attn("head_norm.weight"), attn("head_norm.bias")
    eps, n_heads, width, hidden = kind.head_norm.epsilon, dims.heads, dims.head_dim, dims.hidden

    def run(both: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        x, first = both[..., :hidden], both[..., hidden:]
        state = state or empty_state(x, n_heads, width)
        y = attn_norm(x)
        before, last_y = shifted(y, state[0], real)
        mixed = {name: y + (before - y) * mix for name, mix in mixes.items()}
        r, k, v = (product[name](mixed[name]) for name in ("r", "k", "v"))
        down, up = low["w"]
        decay = (-SLOWEST * up(down(mixed["w"]).tanh()).float().sigmoid()).exp()
        down, up = low["a"]
        rate = up(down(mixed["a"])).sigmoid()
        down, up = low["g"]
        gate = up(down(mixed["g"]).sigmoid())
        unit = normalize((k * unit_scale).unflatten(-1, (n_heads, width)), dim=-1).flatten(2)
        k = k * (1 + (rate - 1) * key_scale)
        if kind.is_first:
            first = v
        else:
            down, up = low["v"]
            v = v + (first - v) * up(down(mixed["v"])).sigmoid()
        heads = [t.float().unflatten(-1, (n_heads, width)) for t in (r, decay, k, v, unit, unit * rate)]
        out, matrix = _recurrence(heads, state[2], real)
        out = group_norm(out.to(x.dtype).flatten(0, 1).flatten(1), n_heads, norm_weight, norm_bias, eps)
        again = (r * k * bonus).unflatten(-1, (n_heads, width)).sum(-1, keepdim=True)
        out = out.view_as(x) + (again * v.unflatten(-1, (n_heads, width))).flatten(2)
        x = x + product["o"](out * gate)
        z = mlp_norm(x)
        before, last_z = shifted(z, state[1], real)
        x = x + value(key(z + (before - z) * channel).relu().square())
        return torch.cat([x, first], -1) if kind.is_first else x, (last_y, last_z, matrix)

    def layer(x: torch.Tensor, table: dict[str, torch.Tensor], cache: Cache) -> torch.Tensor:
        if not kind.is_first:
            return cache.recur(index, run, torch.cat([x, table["values"]], -1))
        x, table["values"] = cache.recur(index, run, x).split(hidden, -1)
        return x

    return layer


def _recurrence(
    tokens: Sequence[torch.Tensor], state: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token.

    Args:
        tokens: r, w, k, v, u and a u, [B, S, heads, head_dim] each.
        state: S, [B, heads, head_dim, head_dim].
        real: [B, S] bool, False for padding.

    Returns:
        o [B, S, heads, head_dim], and S.
    """
    r, decay, k, v, unit, rated = tokens
    out = torch.empty_like(v)
    for t in range(r.shape[1]):
        read = state @ unit[:, t, :, :, None]
        after = state * decay[:, t, :, None] - read * rated[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        state = after if real is None else torch.where(real[:, t, None, None, None], after, state)
        out[:, t] = (state @ r[:, t, :, :, None])[..., 0]
    return out, state
