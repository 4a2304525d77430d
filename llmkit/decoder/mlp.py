"""The torch reader of the MLP kinds."""

from __future__ import annotations

from llmkit.architecture.activations import (
    LAPLACE_DEVIATION,
    LAPLACE_MEAN,
    QUICK_GELU_SLOPE,
    known_activation,
)
from llmkit.architecture.hooks import Hooks, TensorFunction, Weights, reader_of
from llmkit.architecture.kinds import GatedMLP, Kind, PlainMLP
from llmkit.decoder.linear import fused_linear, linear
from llmkit.lazy_imports import torch


def build_mlp(kind: Kind, weights: Weights) -> TensorFunction:
    """The function of an MLP kind, with its weights.

    Raises:
        RequirementError: no torch reader for the kind or its activation.
    """
    return reader_of(kind, _READERS)(weights)


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


def _gated(kind: GatedMLP, weights: Weights) -> TensorFunction:
    act = activation(str(kind.act))
    both = fused_linear(weights, ("gate", "up"))
    down = linear(weights, "down")

    def gated(x: torch.Tensor) -> torch.Tensor:
        gate, up = both(x).chunk(2, dim=-1)
        if gate.requires_grad:  # the derivative of the product needs both factors as they were
            return down(act(gate.clone()) * up)
        return down(act(gate).mul_(up))

    return gated


def _plain(kind: PlainMLP, weights: Weights) -> TensorFunction:
    act = activation(str(kind.act))
    up, down = linear(weights, "up"), linear(weights, "down")
    return lambda x: down(act(up(x)))


_READERS: Hooks[TensorFunction] = {GatedMLP: _gated, PlainMLP: _plain}
