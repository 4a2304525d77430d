"""The layer of RWKV-5 and RWKV-6: a time mix whose state is a matrix for each head, and a channel mix.

For each head, with the state S [keys, values] and what a token gives (r receptance, k key, v value, w decay; u is a
weight):

    o_t = r_t (S_{t-1} + (u * k_t) v_t^T),   S_t = diag(w_t) S_{t-1} + k_t v_t^T

State of a layer: the last token as the time mix and as the channel mix saw it, [B, hidden] float32 each, and S,
[B, heads, head_dim, head_dim] float32. Source: the paper, and BlinkDL/ChatRWKV.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.lazy_imports import torch

from .mix import empty_state, shifted

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Layer, Weights
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.states import State

    from .v5_kind import Eagle

Mixes = Callable[["torch.Tensor", "torch.Tensor"], "tuple[dict[str, torch.Tensor], torch.Tensor]"]
"""(y, the change to the token before), [B, S, hidden] -> what each matrix is given, and the decays."""


def build_layer(kind: Eagle, dims: Sizes, weights: Weights, index: int) -> Layer:
    """The layer of the torch decoder: (x [B, S, hidden], positions' table, cache) -> x."""
    from torch.nn.functional import group_norm, silu

    from llmkit.decoder.linear import linear
    from llmkit.decoder.norms import build_norm

    attn, mlp = weights.under("attn"), weights.under("mlp")
    attn_norm, mlp_norm = (build_norm(kind.norm, weights.under(name)) for name in ("attn_norm", "mlp_norm"))
    product = {name: linear(attn, name) for name in ("r", "k", "v", "g", "o")}
    key, value, receptance = (linear(mlp, name) for name in ("key", "value", "receptance"))
    mixes = _by_token(attn, kind) if kind.is_by_token else _fixed(attn, kind)
    key_share, receptance_share = (_share(kind, mlp, name) for name in ("mix_k", "mix_r"))
    first = attn("first").float()[..., None]
    scale, bias = (attn(f"head_norm.{name}").float() for name in ("weight", "bias"))
    n_heads, width = dims.heads, dims.head_dim

    def run(x: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        state = state or empty_state(x, n_heads, width)
        y = attn_norm(x)
        before, last_y = shifted(y, state[0], real)
        given, decay = mixes(y, before - y)
        r, k, v = (product[n](given[n]).float().unflatten(-1, (n_heads, width)) for n in ("r", "k", "v"))
        out, matrix = _recurrence(r, k, v, decay.unflatten(-1, (n_heads, width)).expand_as(k), first, state[2], real)
        out = group_norm(out.flatten(0, 1).flatten(1), n_heads, scale, bias, kind.head_norm.epsilon)
        out = out.to(x.dtype).view_as(x)
        x = x + product["o"](out * silu(product["g"](given["g"])))
        z = mlp_norm(x)
        before, last_z = shifted(z, state[1], real)
        change = before - z
        gate = receptance(z + change * receptance_share).sigmoid()
        x = x + gate * value(key(z + change * key_share).relu().square())
        return x, (last_y, last_z, matrix)

    return lambda x, table, cache: cache.recur(index, run, x)


def _share(kind: Eagle, weights: Weights, name: str) -> torch.Tensor:
    """The share of the token before [hidden]; RWKV-5 stores that of the token itself."""
    stored = weights(name).view(-1)
    return stored if kind.is_by_token else 1 - stored


def _fixed(attn: Weights, kind: Eagle) -> Mixes:
    shares = {name: _share(kind, attn, f"mix_{name}") for name in kind.mixed}
    decay = (-attn("decay").float().exp()).exp().view(1, 1, -1)
    return lambda y, change: ({name: y + change * share for name, share in shares.items()}, decay)


def _by_token(attn: Weights, kind: Eagle) -> Mixes:
    shares = torch.stack([attn(f"mix_{name}").view(1, -1) for name in kind.mixed])[:, None]  # [5, 1, 1, hidden]
    mix_x, down, up = attn("mix_x").view(-1), attn("mix_down"), attn("mix_up")[:, None]
    base, decay_down, decay_up = attn("decay").float(), attn("decay_down"), attn("decay_up")

    def mixes(y: torch.Tensor, change: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        low = ((y + change * mix_x) @ down).tanh().unflatten(-1, (len(kind.mixed), -1)).permute(2, 0, 1, 3)
        given = dict(zip(kind.mixed, y + change * (shares + low @ up), strict=True))
        decay = base + ((given["w"] @ decay_down).tanh() @ decay_up).float()
        return given, (-decay.exp()).exp()

    return mixes


def _recurrence(
    r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, first: torch.Tensor, state: torch.Tensor,
    real: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Token by token: r, k, v and decay [B, S, heads, head_dim] -> o, of the same shape, and the last S."""
    out = torch.empty_like(v)
    for t in range(r.shape[1]):
        new = k[:, t, :, :, None] * v[:, t, :, None]
        out[:, t] = (r[:, t, :, None] @ (state + first * new))[:, :, 0]
        after = state * decay[:, t, :, :, None] + new
        state = after if real is None else torch.where(real[:, t, None, None, None], after, state)
    return out, state
