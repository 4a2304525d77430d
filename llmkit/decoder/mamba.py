"""The torch readers of state space models and of gated short convolutions; states are float32."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.hooks import Layer, TensorFunction, Weights
from llmkit.architecture.mamba import SelectiveScan, ShortConvolution, StateSpaceDuality
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.gated import activation
from llmkit.decoder.kv import Cache
from llmkit.decoder.linear import linear
from llmkit.decoder.norms import build_norm
from llmkit.decoder.positions import Positions
from llmkit.decoder.states import Recurrence, State, short_convolution
from llmkit.lazy_imports import torch

_TOKENS = 64  # that are computed together: the state is stepped between such chunks


def short_convolution_layer(
    kind: ShortConvolution, weights: Weights, dims: Sizes, layer: int, positions: Positions
) -> Layer:
    """The layer of a gated short convolution; its state is the window [B, K - 1, hidden]."""
    inside, out, convolved = linear(weights, "in"), linear(weights, "out"), _convolution(weights)

    def run(x: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        y, window = convolved(x, state[0] if state is not None else None, real)
        return y, (window,)

    def mix(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        b, c, u = inside(x).chunk(3, -1)
        return out(c * cache.recur(layer, run, b * u))

    return mix


def selective_scan_layer(kind: SelectiveScan, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
    """The layer of Mamba; its states are the window [B, K - 1, inner] and [B, inner, N]."""
    convolved, act, project = _convolution(weights), activation(str(kind.act)), linear(weights, "x")
    a, d = -weights("a_log").float().exp(), weights("d").float()
    step_weight, step_bias = weights("dt.weight"), weights("dt.bias").float()
    n_state, rank = dims.extra["state"], dims.extra["dt_rank"]
    norms = [
        build_norm(norm, weights.under(name)) if kind.weighted else _plain_norm(norm.epsilon)
        for name, norm in kind.norms.items()
    ]

    def run(both: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        u, gate = both.chunk(2, -1)
        u, window = convolved(u, state[0] if state is not None else None, real)
        u = act(u)
        parts = list(project(u).split([rank, n_state, n_state], -1))
        if norms:
            parts = [norm(part) for norm, part in zip(norms, parts, strict=True)]
        step = torch.nn.functional.softplus((parts[0] @ step_weight.T).float() + step_bias)
        step = _of_tokens(step, real)
        held = state[1] if state is not None else a.new_zeros(len(u), *a.shape)
        y, held = selective_scan(u.float(), step, a, parts[1].float(), parts[2].float(), held)
        y = (y + u.float() * d) * torch.nn.functional.silu(gate.float())
        return y.to(both.dtype), (window, held)

    return _between(weights, layer, run)


def duality_layer(kind: StateSpaceDuality, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
    """The layer of Mamba 2; its states are the window [B, K - 1, conv_width] and [B, heads, N, inner / heads]."""
    convolved, act = _convolution(weights), activation(str(kind.act))
    a, d, bias = -weights("a_log").float().exp(), weights("d").float(), weights("dt_bias").float()
    inner, heads, groups, n_state = (dims.extra[name] for name in ("inner", "ssm_heads", "ssm_groups", "state"))
    keys = groups * n_state
    limit = kind.limit if isinstance(kind.limit, tuple) else (0.0, float("inf"))
    scales = _scales(kind, (inner, inner, keys, keys, heads), a)
    finish = _gated_norm(kind, weights, groups)

    def run(all_: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        gate, ubc, step = all_.split([inner, inner + 2 * keys, heads], -1)
        ubc, window = convolved(ubc, state[0] if state is not None else None, real)
        u, b, c = act(ubc).float().split([inner, keys, keys], -1)
        shape = u.shape[:2]
        step = _of_tokens(torch.nn.functional.softplus(step.float() + bias).clamp(*limit), real)
        u = u.view(*shape, heads, -1)
        b, c = (
            x.view(*shape, groups, 1, n_state).expand(-1, -1, -1, heads // groups, -1).flatten(2, 3) for x in (b, c)
        )
        held = state[1] if state is not None else u.new_zeros(len(u), heads, n_state, inner // heads)
        y, held = decaying_attention(c, b, u * step[..., None], step * a, held)
        y = (y + u * d[:, None]).flatten(2)
        return finish(y, gate.float()).to(all_.dtype), (window, held)

    return _between(weights, layer, run, scales)


def decaying_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(decay_t) S_(t - 1) + k_t v_t^T and y_t = q_t^T S_t, whole chunks at once (arXiv:2405.21060, section 6).

    Args:
        q, k: [B, S, H, N] float32.
        v: [B, S, H, P].
        decay: [B, S, H], at most 0.
        state: [B, H, N, P], S before the first token.

    Returns:
        y [B, S, H, P], and the last state.
    """
    out = torch.empty_like(v)
    for start in range(0, q.shape[1], _TOKENS):
        cut = slice(start, start + _TOKENS)
        queries, keys, values = (x[:, cut].transpose(1, 2) for x in (q, k, v))  # [B, H, L, ...]
        # Sums in float64: differences of two large ones are small.
        sums = decay[:, cut].transpose(1, 2).double().cumsum(-1)
        length = sums.shape[-1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        weights = (sums[..., :, None] - sums[..., None, :]).masked_fill(~earlier, float("-inf")).float().exp()
        y = (queries @ keys.transpose(-1, -2) * weights) @ values
        y += (queries @ state) * sums.float().exp()[..., None]
        left = (sums[..., -1:] - sums).float().exp()[..., None]
        state = state * sums[..., -1].float().exp()[..., None, None] + (keys * left).transpose(-1, -2) @ values
        out[:, cut] = y.transpose(1, 2)
    return out, state


def selective_scan(
    u: torch.Tensor, step: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """State_t = exp(step_t a) state_(t - 1) + step_t u_t b_t and y_t = state_t c_t (arXiv:2312.00752, algorithm 2).

    Args:
        u, step: [B, S, inner] float32.
        a: [inner, N].
        b, c: [B, S, N].
        held: [B, inner, N], the state before the first token.

    Returns:
        y [B, S, inner], and the last state.
    """
    out = torch.empty_like(u)
    for start in range(0, u.shape[1], _TOKENS):
        cut = slice(start, start + _TOKENS)
        decay = (step[:, cut, :, None] * a).exp()
        states = (step[:, cut] * u[:, cut])[..., None] * b[:, cut, None, :]
        for t in range(states.shape[1]):
            held = torch.addcmul(states[:, t], decay[:, t], held)
            states[:, t] = held
        out[:, cut] = (states @ c[:, cut, :, None])[..., 0]
    return out, held.clone()  # the chunk it lies in may go


def _between(weights: Weights, layer: int, run: Recurrence, scales: torch.Tensor | None = None) -> Layer:
    """A recurrence between its projections."""
    inside, out = linear(weights, "in"), linear(weights, "out")

    def mix(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        y = inside(x)
        return out(cache.recur(layer, run, y if scales is None else y * scales.to(y.dtype)))

    return mix


def _convolution(weights: Weights) -> Any:
    """(x [B, S, C], the window or None, real) -> the convolution, and the next window."""
    weight = weights("conv.weight")
    bias = weights("conv.bias") if weights.has("conv.bias") else None

    def convolved(
        x: torch.Tensor, window: torch.Tensor | None, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = x.new_zeros(len(x), weight.shape[-1] - 1, x.shape[-1]) if window is None else window
        return short_convolution(x, weight, bias, before, real)

    return convolved


def _of_tokens(step: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Steps [B, S, …], 0 at padding: such a step leaves a state as it is."""
    return step if real is None else step.masked_fill(~real[..., None], 0)


def _scales(kind: StateSpaceDuality, widths: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
    """What the input projection is multiplied by, [in_width]."""
    if not isinstance(kind.multipliers, tuple):
        return None
    return torch.cat([like.new_full((n,), float(m)) for n, m in zip(widths, kind.multipliers, strict=True)])


def _plain_norm(eps: float) -> TensorFunction:
    """RMS norm without a weight."""
    return lambda x: torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


def _gated_norm(kind: StateSpaceDuality, weights: Weights, groups: int) -> Any:
    """(y [B, S, inner], gate) float32 -> both together, the norm over each group."""
    silu = torch.nn.functional.silu
    if kind.gated_norm is None:
        return lambda y, gate: y * silu(gate)
    weight, norm = weights("norm.weight").float(), _plain_norm(kind.gated_norm.epsilon)

    def normed(y: torch.Tensor) -> torch.Tensor:
        return norm(y.unflatten(-1, (groups, -1))).flatten(-2) * weight

    if kind.norm_before_gate:
        return lambda y, gate: normed(y) * silu(gate)
    return lambda y, gate: normed(y * silu(gate))
