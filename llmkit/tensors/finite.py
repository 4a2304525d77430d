"""Weights that share a scale: one NaN or infinity among them, or a scale beyond its dtype, would destroy the group.

Every quantizer refuses such weights here, with the same message. (A cast loses single values only, which are counted.)
"""

from __future__ import annotations

from llmkit.errors import InputError
from llmkit.lazy_imports import torch


def require_finite(weights: torch.Tensor, *numbers: torch.Tensor, name: str = "", what: str = "weights") -> None:
    """Refuse weights that have no finite scale.

    Args:
        weights: to be quantized, a float tensor of any shape; read only to name the cause.
        numbers: computed from them, and must be finite: scales, minima, extremes; of any shape.
        name: the tensor's name, for the message.
        what: the noun for the message.

    Raises:
        InputError: one of `numbers` is NaN or infinite.
    """
    if all(bool(torch.isfinite(x).all()) for x in numbers):
        return
    whose = f"{name}: " if name else ""
    if not torch.isfinite(weights).all():
        raise InputError(
            f"{whose}the {what} hold NaN or infinities, which no grid can represent",
            hint="download it again; where its training diverged, take an earlier checkpoint",
        )
    largest = float(weights.abs().max())
    raise InputError(
        f"{whose}the {what} reach {largest:.3g}: the scale of such a group is beyond the dtype of the scales",
        hint="leave this matrix in floats (quantize --keep), or store a wider type (convert --to gguf --type f32)",
    )


def count_not_finite(values: torch.Tensor) -> int:
    """How many elements of a float tensor of any shape are NaN or infinite; 0 for integers.

    The sum is finite only if all elements are, and takes a fraction of the time of a test of each element.
    """
    if not values.is_floating_point() or values.element_size() < 2 or bool(values.sum().isfinite()):
        return 0
    return int((~values.isfinite()).sum())
