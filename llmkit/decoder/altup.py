"""The torch reader of alternating updates: `llmkit/architecture/altup.py` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.architecture.altup import AltUpBlock
from llmkit.architecture.hooks import Layer, TensorFunction, Weights
from llmkit.architecture.layer_inputs import InputGate
from llmkit.decoder.kv import Cache
from llmkit.decoder.layer_inputs import SideColumns, input_gate
from llmkit.decoder.linear import Linear, linear
from llmkit.decoder.norms import build_norm
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch


def build_altup(
    block: AltUpBlock, weights: Weights, norms: Sequence[TensorFunction], attention: Any, mlp: TensorFunction
) -> Layer:
    """One layer on all streams, and what goes beside them.

    Raises:
        RequirementError: a gate of another kind.
    """
    if not isinstance(block.gate, InputGate):
        raise RequirementError("the torch decoder computes alternating updates with inputs of layers only")
    attn_norm, attn_post_norm, mlp_norm, mlp_post_norm = norms
    n, active = block.streams, block.index
    gate = input_gate(block.gate, weights.under("input"))
    own = weights.under("altup")
    router, predict, correct = (Linear(own(f"{name}.weight"), None) for name in ("router", "predict", "correct"))
    router_norm, scale = build_norm(block.norm, own.under("router_norm")), own("scale")
    left, right = (linear(weights, f"laurel.{side}") for side in ("left", "right"))
    laurel_norm = build_norm(block.norm, weights.under("laurel.norm"))

    def modalities(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(router(router_norm(x) * x.shape[-1] ** -1.0).float()).to(x.dtype)

    def layer(x: torch.Tensor, table: Any, cache: Cache) -> torch.Tensor:
        hidden = len(scale)
        side = SideColumns(table, x[..., n * hidden :])
        h = x[..., : n * hidden].unflatten(-1, (n, hidden))
        h = h + predict(modalities(h[..., active, :])).unflatten(-1, (n, n)) @ h
        one = h[..., active, :]
        z = attn_norm(one)
        attended = one + attn_post_norm(attention(z, side, cache))
        y = (attended + z + laurel_norm(right(left(z)))) * 2.0**-0.5
        y = y + mlp_post_norm(mlp(mlp_norm(y)))
        h = h + (1 + correct(modalities(y)))[..., None] * (y - one)[..., None, :]
        seen = h[..., active, :] * scale if block.scales_output else h[..., active, :]
        added = gate(seen, side.columns)[..., None, :]
        return torch.cat([h[..., 0, :], (h[..., 1:, :] + added).flatten(-2), side.columns], -1)

    return layer
