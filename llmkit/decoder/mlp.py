"""The torch reader of the MLP kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.architecture.kinds import GatedMLP, Kind, PlainMLP
from llmkit.decoder.linear import fused_linear, linear
from llmkit.decoder.readers import Readers, Weights, reader_of
from llmkit.errors import RequirementError

if TYPE_CHECKING:
    import torch

    Function = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["activation", "build_mlp"]


def build_mlp(kind: Kind, weights: Weights) -> Function:
    """The function of an MLP kind, with its weights.

    Raises:
        RequirementError: no torch reader for the kind or its activation.
    """
    made: Function = reader_of(kind, _READERS)(kind, weights)
    return made


def activation(name: str) -> Function:
    """The activation that configs call `name`; it may overwrite its argument.

    Raises:
        RequirementError: unknown name.
    """
    from torch.nn import functional

    table: dict[str, Function] = {
        "silu": lambda x: functional.silu(x, inplace=True),
        "swish": lambda x: functional.silu(x, inplace=True),
        "gelu": functional.gelu,
        "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu_,
    }
    if name not in table:
        raise RequirementError(
            f"the torch decoder does not know the activation {name!r}", hint=f"it knows {', '.join(table)}"
        )
    return table[name]


def _gated(kind: GatedMLP, weights: Weights) -> Function:
    act = activation(str(kind.act))
    both = fused_linear(weights, ("gate", "up"))
    down = linear(weights, "down")

    def gated(x: torch.Tensor) -> torch.Tensor:
        gate, up = both(x).chunk(2, dim=-1)
        return down(act(gate).mul_(up))

    return gated


def _plain(kind: PlainMLP, weights: Weights) -> Function:
    act = activation(str(kind.act))
    up, down = linear(weights, "up"), linear(weights, "down")
    return lambda x: down(act(up(x)))


_READERS: Readers = {GatedMLP: _gated, PlainMLP: _plain}
