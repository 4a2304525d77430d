"""The torch reader of the norm kinds."""

from __future__ import annotations

from llmkit.architecture.hooks import Hooks, TensorFunction, Weights, reader_of
from llmkit.architecture.kinds import Kind, LayerNorm, NoNorm, RMSNorm
from llmkit.lazy_imports import torch


def build_norm(kind: Kind, weights: Weights) -> TensorFunction:
    """The function of a norm kind, with its weights.

    Raises:
        RequirementError: no torch reader for the kind.
    """
    return reader_of(kind, _READERS)(weights)


def _rms(kind: RMSNorm, weights: Weights) -> TensorFunction:
    from torch.nn.functional import rms_norm

    weight = weights("weight")
    eps = kind.epsilon
    if kind.offset:
        scale = weight.float() + kind.offset
        return lambda x: rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)
    if weight.dtype is torch.float32:
        return lambda x: rms_norm(x, weight.shape, weight, eps)

    def narrow(x: torch.Tensor) -> torch.Tensor:
        # Statistics in float32, rounded before the weight is applied: the published models were trained this way.
        return rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight

    return narrow


def _layer_norm(kind: LayerNorm, weights: Weights) -> TensorFunction:
    from torch.nn.functional import layer_norm

    weight = weights("weight")
    bias = weights("bias") if weights.has("bias") else None
    eps = kind.epsilon
    if kind.offset:
        scale, shift = weight.float() + kind.offset, None if bias is None else bias.float()
        return lambda x: layer_norm(x.float(), scale.shape, scale, shift, eps).to(x.dtype)
    return lambda x: layer_norm(x, weight.shape, weight, bias, eps)


def _none(kind: NoNorm, weights: Weights) -> TensorFunction:
    return lambda x: x


_READERS: Hooks[TensorFunction] = {RMSNorm: _rms, LayerNorm: _layer_norm, NoNorm: _none}
