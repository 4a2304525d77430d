"""How readers find the code for a kind: by its type, or in the kind itself when a plugin brought it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.architecture.kinds import Kind
from llmkit.errors import RequirementError

if TYPE_CHECKING:
    import torch

    from llmkit.decoder.linear import Linear

__all__ = ["Readers", "Weights", "reader_of"]

Readers = Mapping[type, Callable[..., Any]]


class Weights(Protocol):
    """The weights of one kind: leaf name -> tensor in the compute dtype, on the device."""

    def __call__(self, leaf: str) -> torch.Tensor:
        """The tensor of `leaf` (`q.weight`)."""

    def has(self, leaf: str) -> bool:
        """True when the model has that weight."""

    def under(self, stem: str) -> Weights:
        """The weights below `stem`."""

    def watched(self, layer: Linear, names: Sequence[str]) -> Linear:
        """A linear layer made of the weights `<name>.weight`, as it is to be called: calibration sees its inputs."""


def reader_of(kind: Kind, readers: Readers) -> Callable[..., Any]:
    """The reader of a kind's type, or the `torch_reader` that a plugin's own kind carries.

    Raises:
        RequirementError: there is neither.
    """
    found: Callable[..., Any] | None = readers.get(type(kind)) or getattr(kind, "torch_reader", None)
    if found is None:
        name = type(kind).__name__
        raise RequirementError(
            f"the torch decoder has no reader for the kind {name}",
            hint="give the kind a `torch_reader` in its plugin",
        )
    return found
