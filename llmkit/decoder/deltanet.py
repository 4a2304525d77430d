"""The torch reader of the gated delta rule's kind: projections, a short convolution, and the rule itself."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.deltanet import NORM_EPS, GatedDeltaNet, KimiDeltaAttention
from llmkit.architecture.hooks import Layer, Weights
from llmkit.architecture.sizes import Sizes
from llmkit.decoder.delta_rule import delta_rule
from llmkit.decoder.gated import activation
from llmkit.decoder.kv import Cache
from llmkit.decoder.linear import fused_linear, linear
from llmkit.decoder.norms import build_norm
from llmkit.decoder.positions import Positions
from llmkit.decoder.states import Recurrence, State, short_convolution
from llmkit.lazy_imports import torch


def gated_delta_net(kind: GatedDeltaNet, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
    """The layer: (x [B, S, hidden], no table, cache) -> [B, S, hidden]. The rule and its state are float32.

    Its state is the window of the convolution, [B, kernel - 1, channels], and [B, value_heads, key_dim, value_dim].
    """
    from torch.nn.functional import silu

    value_dim = dims.extra["delta_value_dim"]
    width = dims.extra["delta_value_heads"] * value_dim
    inputs = fused_linear(weights, ("in_q", "in_k", "in_v", "in_b", "in_a", "in_z"))
    run = _recurrence(kind, weights, dims)
    norm, out = build_norm(kind.norm, weights.under("out_norm")), linear(weights, "out")

    def attention(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        projected = inputs(x)
        qkv, gate = projected[..., :-width], projected[..., -width:]
        y = norm(cache.recur(layer, run, qkv).unflatten(-1, (-1, value_dim)))
        return out((y.flatten(2) * silu(gate.float())).to(x.dtype))

    return attention


def kimi_delta_attention(
    kind: KimiDeltaAttention, weights: Weights, dims: Sizes, layer: int, positions: Positions
) -> Layer:
    """The same layer where each channel has a decay."""
    width = dims.extra["delta_key_dim"]
    inputs = fused_linear(weights, ("q", "k", "v", "rate", "decay_a", "gate_a"))
    decay, gate = linear(weights, "decay_b"), linear(weights, "gate_b")
    run = _recurrence(kind, weights, dims)
    norm, out = build_norm(kind.norm, weights.under("out_norm")), linear(weights, "o")

    def attention(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        projected = inputs(x)
        qkv, down, gated = projected.split([projected.shape[-1] - 2 * width, width, width], -1)
        y = norm(cache.recur(layer, run, torch.cat([qkv, decay(down)], -1)).unflatten(-1, (-1, width)))
        return out((y.flatten(2) * gate(gated).float().sigmoid()).to(x.dtype))

    return attention


def _recurrence(kind: GatedDeltaNet, weights: Weights, dims: Sizes) -> Recurrence:
    """What goes through the cache: queries, keys, values, rates b and decays a side by side in, values out."""
    from torch.nn.functional import softplus

    n_keys, n_values = dims.extra["delta_key_heads"], dims.extra["delta_value_heads"]
    key_dim, value_dim = dims.extra["delta_key_dim"], dims.extra["delta_value_dim"]
    widths = [n_keys * key_dim, n_keys * key_dim, n_values * value_dim]
    filters = torch.cat([weights(f"conv_{name}.weight") for name in "qkv"])
    act = activation(str(kind.act))
    shift = weights("dt_bias").float()
    channels = shift.shape[0] // n_values  # decays of a head
    slope = -weights("A_log").float().exp().flatten().repeat_interleave(channels)

    def heads(x: torch.Tensor, width: int) -> torch.Tensor:
        """[B, S, H * width] -> [B, value_heads, S, width] float32; a head of keys stands for those it serves."""
        split: torch.Tensor = x.float().unflatten(-1, (-1, width)).transpose(1, 2)
        return split.repeat_interleave(n_values // split.shape[1], 1) if split.shape[1] != n_values else split

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()

    def run(x: torch.Tensor, state: State | None, real: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        if state is None:
            window = x.new_zeros(x.shape[0], filters.shape[2] - 1, sum(widths))
            matrix = x.new_zeros(x.shape[0], n_values, key_dim, value_dim, dtype=torch.float32)
        else:
            window, matrix = state
        qkv, b, a = x.split([sum(widths), n_values, shift.shape[0]], -1)
        qkv, window = short_convolution(qkv, filters, None, window, real)
        q, k, v = act(qkv).split(widths, -1)
        rate, decay = b.sigmoid().float(), slope * softplus(a.float() + shift)
        if real is not None:
            rate, decay = rate * real[..., None], decay * real[..., None]
        q, k = (unit(heads(part, key_dim)) for part in (q, k))
        decay = decay.transpose(1, 2) if channels == 1 else heads(decay, channels)
        y, matrix = delta_rule(q * key_dim**-0.5, k, heads(v, value_dim), decay, rate.transpose(1, 2), matrix)
        return y.transpose(1, 2).flatten(2).to(x.dtype), (window, matrix)

    return run
