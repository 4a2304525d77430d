"""The torch reader of the norm kinds."""

from __future__ import annotations

from llmkit.architecture.altup import LEAST_SQUARE, AltUpNorm
from llmkit.architecture.hooks import Hooks, TensorFunction, Weights, reader_of
from llmkit.architecture.kinds import HeadNorm, Kind, LayerNorm, NoNorm, RMSNorm, UnitRMS
from llmkit.architecture.layer_inputs import HiddenNorm
from llmkit.decoder.linear import linear
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

    if not kind.affine:
        return lambda x: layer_norm(x.float(), x.shape[-1:], eps=kind.epsilon).to(x.dtype)
    weight = weights("weight")
    bias = weights("bias") if weights.has("bias") else None
    eps = kind.epsilon
    if kind.offset:
        scale, shift = weight.float() + kind.offset, None if bias is None else bias.float()
        return lambda x: layer_norm(x.float(), scale.shape, scale, shift, eps).to(x.dtype)
    return lambda x: layer_norm(x, weight.shape, weight, bias, eps)


def _head_norm(kind: HeadNorm, weights: Weights) -> TensorFunction:
    from torch.nn.functional import layer_norm

    scale = torch.stack([weights(leaf) for leaf in kind.leaves]).float()
    return lambda x: (layer_norm(x.float(), x.shape[-1:], eps=kind.epsilon) * scale).to(x.dtype)


def _hidden_norm(kind: HiddenNorm, weights: Weights) -> TensorFunction:
    norm, width = _rms(kind, weights), len(weights("weight"))
    return lambda x: norm(x[..., :width])


def as_long(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """X [..., hidden] rescaled to the L2 norm of `first`, row by row."""
    square = x.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE)
    return x * first.square().mean(-1, keepdim=True).sqrt() / square.sqrt()


def _altup_norm(kind: AltUpNorm, weights: Weights) -> TensorFunction:
    norm, n, width = _rms(kind, weights), kind.streams, len(weights("weight"))
    others = [linear(weights, f"stream.{i}") for i in range(1, n)]

    def merged(x: torch.Tensor) -> torch.Tensor:
        first, *rest = x[..., : n * width].split(width, -1)
        parts = [as_long(project(part), first) for project, part in zip(others, rest, strict=True)]
        return norm(torch.stack([first, *parts]).mean(0))

    return merged


def _unit_rms(kind: UnitRMS, weights: Weights) -> TensorFunction:
    from torch.nn.functional import rms_norm

    return lambda x: rms_norm(x.float(), x.shape[-1:], None, kind.epsilon).to(x.dtype)


def _none(kind: NoNorm, weights: Weights) -> TensorFunction:
    return lambda x: x


_READERS: Hooks[TensorFunction] = {
    AltUpNorm: _altup_norm,
    HeadNorm: _head_norm,
    HiddenNorm: _hidden_norm,
    LayerNorm: _layer_norm,
    NoNorm: _none,
    RMSNorm: _rms,
    UnitRMS: _unit_rms,
}
