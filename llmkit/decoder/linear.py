"""Matrix products of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.architecture.hooks import Weights
from llmkit.lazy_imports import torch


class Linear:
    """y = x @ weight^T + bias; weight is [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        from torch.nn import functional

        self.weight = weight
        self.bias = bias
        self._product = functional.linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self.weight_for(x), self.bias)

    def weight_for(self, x: torch.Tensor) -> torch.Tensor:
        """The weight, where a product with x is computed in another order; calibration sees x."""
        return self.weight


def linear(weights: Weights, name: str) -> Linear:
    """The linear layer whose leaves are `<name>.weight` and, where the model has it, `<name>.bias`."""
    return weights.observed_linear(_linear(weights, name), [name])


def fused_linear(weights: Weights, names: Sequence[str]) -> Linear:
    """Several linear layers of one input as one product, their outputs side by side."""
    parts = [_linear(weights, name) for name in names]
    weight = torch.cat([p.weight for p in parts])
    biases = [p.bias for p in parts if p.bias is not None]
    return weights.observed_linear(Linear(weight, torch.cat(biases) if len(biases) == len(parts) else None), names)


def _linear(weights: Weights, name: str) -> Linear:
    bias = weights(f"{name}.bias") if weights.has(f"{name}.bias") else None
    return Linear(weights(f"{name}.weight"), bias)
