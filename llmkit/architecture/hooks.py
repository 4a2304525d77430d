"""The hooks of a kind: arguments and results of its reader, emitter and feeds; one protocol for each role.

A plugin's own kind has the methods of its role: `torch_reader` makes the decoder's part, `onnx_emitter` writes the
graph's. The kinds of the core have the same two as functions in `llmkit/decoder/` and `llmkit/onnx/`, with the kind as
first argument. B is the batch, S the new tokens, T past and new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from llmkit.architecture.kind import Kind
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch

if TYPE_CHECKING:  # this module only names what the floors above have
    from llmkit.architecture.model import Model
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.kv import Cache
    from llmkit.decoder.linear import Linear
    from llmkit.decoder.positions import Positions
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.graph import Value
    from llmkit.onnx.norms import Stream
    from llmkit.onnx.positions import GraphPositions
    from llmkit.onnx.weights import GraphWeights

TensorFunction: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""x [B, S, width] -> [B, S, width'], in the compute dtype."""
Layer: TypeAlias = "Callable[[torch.Tensor, Any, Cache], torch.Tensor]"
"""(x [B, S, hidden], what the positions' `table` gave, the cache) -> [B, S, hidden]."""
GraphFunction: TypeAlias = "Callable[[Value], Value]"
"""x [B, S, hidden] -> [B, S, hidden], nodes of a graph."""


class Weights(Protocol):
    """The weights of one kind: leaf name -> tensor in the compute dtype, on the device."""

    def __call__(self, leaf: str) -> torch.Tensor:
        """The tensor of `leaf` (`q.weight`)."""

    def has(self, leaf: str) -> bool:
        """True when the model has that weight."""

    def under(self, stem: str) -> Weights:
        """The weights below `stem`."""

    def observed_linear(self, layer: Linear, names: Sequence[str]) -> Linear:
        """A linear layer made of the weights `<name>.weight`, as it is to be called: calibration sees its inputs."""


class NormHooks(Protocol):
    """A norm over the last dimension."""

    def torch_reader(self, weights: Weights) -> TensorFunction:
        """The norm of x [..., width]."""

    def onnx_emitter(self, weights: GraphWeights, x: Value) -> Value:
        """The same in a graph."""


class MLPHooks(Protocol):
    """What follows attention in a layer."""

    def torch_reader(self, weights: Weights) -> TensorFunction:
        """[B, S, hidden] -> [B, S, hidden]; it may overwrite what it makes, not its argument."""

    def onnx_emitter(self, weights: GraphWeights, x: Value) -> Value:
        """The same in a graph."""


class RouterHooks(Protocol):
    """Which experts a token goes to (`Experts.router`); the kind also has `n_experts` and `n_chosen`."""

    def torch_reader(self, weights: Weights) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """X [N, hidden] -> the experts of each token, int64 [N, n_chosen], and their weights, none below 0."""

    def onnx_emitter(self, weights: GraphWeights, x: Value) -> tuple[Value, Value]:
        """The same in a graph, the weights in float32; here `weights` are those of the whole MLP."""


class AttentionHooks(Protocol):
    """The attention of one layer."""

    def torch_reader(self, weights: Weights, dims: Sizes, layer: int, positions: Positions) -> Layer:
        """Keys and values go through the cache: `cache.attend(layer, …)`."""

    def onnx_emitter(
        self, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, x: Value
    ) -> Value:
        """X [B, S, hidden] -> [B, S, hidden]; what later calls need is an input, an output and a line of `state`."""


class PositionHooks(Protocol):
    """How attention sees the order of tokens."""

    def torch_reader(self, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
        """One object for all layers that have the kind."""

    def onnx_emitter(self) -> GraphPositions:
        """The same for a graph."""


@runtime_checkable
class FeedsGraph(Protocol):
    """A position kind whose graph has inputs that follow from the first tokens of a sequence."""

    def onnx_feeds(self, ids: list[int]) -> dict[str, int]:
        """Name of an input [B] int64 -> its value for the sequence that begins with `ids`."""


class ResidualHooks(Protocol):
    """How norms, attention and MLP of a layer are wired; `norms` names the norms there are."""

    norms: tuple[str, ...]

    def torch_reader(self, norms: Sequence[TensorFunction], attention: Layer, mlp: TensorFunction) -> Layer:
        """The layer; `norms` in the order of the names."""

    def onnx_emitter(
        self, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
    ) -> None:
        """The layer on the stream: `stream.normed(norm, weights.under(name))`, then `stream.add(attention(…))`."""


class BlockHooks(Protocol):
    """A whole layer that is no attention block."""

    def torch_reader(self, model: Model, weights: Weights, layer: int, positions: Positions) -> Layer:
        """The layer; a recurrence goes through the cache: `cache.recur(layer, …)`."""

    def onnx_emitter(
        self, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
    ) -> None:
        """The layer on the stream."""


R = TypeVar("R")
Hooks: TypeAlias = Mapping[type, Callable[..., R]]
"""The core's readers, or emitters, of one role: a kind's type -> function of the kind and what the hook is given."""


def reader_of(kind: Kind, readers: Hooks[R]) -> Callable[..., R]:
    """The torch reader of a kind: the core's for its type, or its own `torch_reader`.

    Raises:
        RequirementError: there is neither.
    """
    hint = "give the kind a `torch_reader` in its plugin"
    return _hook(kind, readers, "torch_reader", "the torch decoder has no reader", hint)


def emitter_of(kind: Kind, emitters: Hooks[R]) -> Callable[..., R]:
    """The graph emitter of a kind: the core's for its type, or its own `onnx_emitter`.

    Raises:
        RequirementError: there is neither.
    """
    hint = "give the kind an `onnx_emitter` in its plugin, or export with --via optimum"
    return _hook(kind, emitters, "onnx_emitter", "the ONNX export has no emitter", hint)


def _hook(kind: Kind, readers: Hooks[R], name: str, lack: str, hint: str) -> Callable[..., R]:
    function = readers.get(type(kind))
    if function is not None:
        return lambda *given: function(kind, *given)
    method: Callable[..., R] | None = getattr(kind, name, None)
    if method is None:
        raise RequirementError(f"{lack} for the kind {type(kind).__name__}", hint=hint)
    return method
