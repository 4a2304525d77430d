"""The torch reader of the MLP kinds."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.experts import Experts
from llmkit.architecture.hooks import Hooks, TensorFunction, Weights, reader_of
from llmkit.architecture.kinds import GatedMLP, Kind, PlainMLP
from llmkit.architecture.mamba import NoMLP
from llmkit.architecture.parallel_experts import ParallelExperts
from llmkit.decoder.experts import experts, parallel_experts
from llmkit.decoder.gated import activation, gated_mlp
from llmkit.decoder.linear import linear
from llmkit.lazy_imports import torch


def build_mlp(kind: Kind, weights: Weights) -> TensorFunction:
    """The function of an MLP kind, with its weights.

    Raises:
        RequirementError: no torch reader for the kind or its activation.
    """
    function: TensorFunction = reader_of(kind, _READERS)(weights)
    return function


def _plain(kind: PlainMLP, weights: Weights) -> TensorFunction:
    act = activation(str(kind.act))
    up, down = linear(weights, "up"), linear(weights, "down")
    return lambda x: down(act(up(x)))


def _none(kind: NoMLP, weights: Weights) -> TensorFunction:
    return torch.zeros_like


_READERS: Hooks[Any] = {
    ParallelExperts: parallel_experts,
    Experts: experts,
    GatedMLP: gated_mlp,
    NoMLP: _none,
    PlainMLP: _plain,
}
