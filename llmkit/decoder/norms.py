"""The torch reader of the norm kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.architecture.keys import as_float
from llmkit.architecture.kinds import Kind, LayerNorm, NoNorm, RMSNorm
from llmkit.decoder.readers import Readers, Weights, reader_of

if TYPE_CHECKING:
    import torch

    Norm = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["build_norm"]


def build_norm(kind: Kind, weights: Weights) -> Norm:
    """The function of a norm kind, with its weights.

    Raises:
        RequirementError: no torch reader for the kind.
    """
    made: Norm = reader_of(kind, _READERS)(kind, weights)
    return made


def _rms(kind: RMSNorm, weights: Weights) -> Norm:
    import torch
    from torch.nn.functional import rms_norm

    weight = weights("weight")
    eps = as_float(kind.eps)
    if kind.offset:
        scale = weight.float() + kind.offset
        return lambda x: rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)
    if weight.dtype is torch.float32:
        return lambda x: rms_norm(x, weight.shape, weight, eps)

    def narrow(x: torch.Tensor) -> torch.Tensor:
        # Statistics in float32, rounded before the weight is applied: the published models were trained this way.
        return rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight

    return narrow


def _layer_norm(kind: LayerNorm, weights: Weights) -> Norm:
    from torch.nn.functional import layer_norm

    weight = weights("weight")
    bias = weights("bias") if weights.has("bias") else None
    eps = as_float(kind.eps)
    return lambda x: layer_norm(x, weight.shape, weight, bias, eps)


def _none(kind: NoNorm, weights: Weights) -> Norm:
    return lambda x: x


_READERS: Readers = {RMSNorm: _rms, LayerNorm: _layer_norm, NoNorm: _none}
