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
        n_tokens: how many rows of x were seen, or what else the sums are to be divided by for the mean.
        second_moments: the sum of x x^T, float32 or float64 [in, in].
        squares: its diagonal, the sum of x^2, float32 or float64 [in].
        maxima: the largest |x|, float32 [in].
        inputs: x itself, [tokens, in].
    """

    n_tokens: float
    second_moments: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    maxima: torch.Tensor | None = None
    inputs: torch.Tensor | None = None

    @property
    def mean_squares(self) -> torch.Tensor | None:
        """The mean of x^2 of each input channel, float32 [in]; None where nothing tells it, or all of them are 0."""
        squares = self.squares
        if squares is None and self.second_moments is not None:
            squares = self.second_moments.diagonal()
        if squares is None or not bool((squares > 0).any()):
            return None
        return squares.float() / max(self.n_tokens, 1)
