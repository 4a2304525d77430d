"""Activations, and the gated MLP: alone, as an expert, as what all tokens share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from llmkit.architecture.activations import LAPLACE_DEVIATION, LAPLACE_MEAN, QUICK_GELU_SLOPE, known_activation
from llmkit.architecture.altup import GaussianTopK
from llmkit.architecture.experts import ClampedSwiGLU
from llmkit.architecture.hooks import Hooks, TensorFunction, Weights, reader_of
from llmkit.architecture.keys import as_float
from llmkit.architecture.kinds import GatedMLP, Kind
from llmkit.decoder.linear import fused_linear, linear
from llmkit.lazy_imports import torch

Product: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(gate, up) -> what goes into down, all [..., width]; they may be overwritten."""


def activation(name: str) -> TensorFunction:
    """The activation that configs call `name`; it may overwrite its argument.

    Raises:
        RequirementError: unknown name.
    """
    from torch.nn import functional

    def approximate_gelu(x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x, approximate="tanh")

    table: dict[str, TensorFunction] = {
        "silu": lambda x: functional.silu(x, inplace=True),
        "gelu": functional.gelu,
        "gelu_10": lambda x: functional.gelu(x).clamp_(-10, 10),
        "gelu_pytorch_tanh": approximate_gelu,
        "hardswish": lambda x: functional.hardswish(x, inplace=True),
        "laplace": lambda x: 0.5 * (1 + torch.erf((x - LAPLACE_MEAN) / (LAPLACE_DEVIATION * 2**0.5))),
        "leaky_relu": functional.leaky_relu_,
        "linear": lambda x: x,
        "mish": lambda x: functional.mish(x, inplace=True),
        "quick_gelu": lambda x: x * torch.sigmoid(QUICK_GELU_SLOPE * x),
        "relu": functional.relu_,
        "relu2": lambda x: functional.relu_(x).square(),
        "relu6": lambda x: functional.relu6(x, inplace=True),
        "sigmoid": torch.sigmoid_,
        "sqrtsoftplus": lambda x: functional.softplus(x).sqrt_(),
        "tanh": torch.tanh_,
    }
    return table[known_activation(name)]


def gated_mlp(kind: GatedMLP, weights: Weights) -> TensorFunction:
    """The gated MLP made of `gate`, `up` and `down` of the weights, with the activation of the kind."""
    both = fused_linear(weights, ("gate", "up"))
    down = linear(weights, "down")
    if isinstance(kind.act, Kind):
        product = reader_of(kind.act, _PRODUCTS)()
        return lambda x: down(product(*both(x).chunk(2, dim=-1)))
    act = activation(str(kind.act))
    if isinstance(kind.multipliers, tuple):
        of_gate, of_all = kind.multipliers

        def scaled(x: torch.Tensor) -> torch.Tensor:
            gate, up = both(x).chunk(2, dim=-1)
            return down(act(gate * of_gate) * up) * of_all

        return scaled

    def gated(x: torch.Tensor) -> torch.Tensor:
        gate, up = both(x).chunk(2, dim=-1)
        if gate.requires_grad:  # the derivative of the product needs both factors as they were
            return down(act(gate.clone()) * up)
        return down(act(gate).mul_(up))

    return gated


def _clamped(kind: ClampedSwiGLU) -> Product:
    alpha, limit = as_float(kind.alpha), as_float(kind.limit)

    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    return product


def _gaussian_top_k(kind: GaussianTopK) -> Product:
    act, quantile = activation(str(kind.act)), kind.quantile

    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        mean, std = gate.mean(-1, keepdim=True), gate.std(-1, keepdim=True, unbiased=False)
        return act(torch.relu(gate - (mean + std * quantile))) * up

    return product


_PRODUCTS: Hooks[Product] = {ClampedSwiGLU: _clamped, GaussianTopK: _gaussian_top_k}
"""Activations that are kinds."""
