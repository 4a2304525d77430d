"""Round to nearest on the grid with the least error, weighted by the inputs where they were measured."""

from __future__ import annotations

from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.rtn import RoundToNearest
from llmkit.quantization.search import importance_of, searched_scales
from llmkit.quantization.statistics import Statistics


class LeastSquares(RoundToNearest):
    """Every row from itself and the mean of x^2 of each input channel."""

    name = "mse"
    words = "rounded to nearest on the grid with the least error"
    uses = frozenset({"squares"})

    def scales(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return searched_scales(weight, grid, scale_dtype, importance_of(statistics, weight.shape[1:]))


METHOD = LeastSquares()
