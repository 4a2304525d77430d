"""Weights that share a scale: one NaN or infinity among them, or a scale beyond its dtype, would lose them all.

Whoever puts weights on a grid asks here, and refuses them with the same words. (A cast loses single values only: those
are counted and named instead.)
"""

from __future__ import annotations

from llmkit.errors import InputError
from llmkit.lazy_imports import torch


def require_finite(weights: torch.Tensor, *numbers: torch.Tensor, name: str = "", what: str = "weights") -> None:
    """Refuse weights that no scale holds.

    Args:
        weights: what is put on a grid; looked at only to tell the cause.
        numbers: what was computed of them and must be finite: scales, minima, extremes.
        name: the tensor's, where it is known.
        what: they are.

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
    """How many elements of a float tensor [...] are NaN or infinite; 0 for integers.

    The sum tells in one pass, many times as fast as a look at each element: it is finite only where all of them are.
    """
    if not values.is_floating_point() or values.element_size() < 2 or bool(values.sum().isfinite()):
        return 0
    return int((~values.isfinite()).sum())
