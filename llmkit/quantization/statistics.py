"""What was measured of the inputs of one linear layer, for methods that look at more than its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Statistics"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Inputs x [tokens, in] of a layer, summed up; what was not measured is None.

    Attributes:
        n_tokens: how many rows of x were seen.
        second_moments: the sum of x x^T, float32 or float64 [in, in].
        squares: its diagonal, the sum of x^2, float32 or float64 [in].
        maxima: the largest |x|, float32 [in].
        inputs: x itself, [tokens, in].
    """

    n_tokens: int
    second_moments: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    maxima: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
