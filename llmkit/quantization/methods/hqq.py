"""HQQ: zero points for which the error of the weights has few large entries; no text and no statistics are needed.

With W_r what rounding restores of a group W, it alternates between an error e that may differ from W - W_r, and the
zero point z (half-quadratic splitting of the norm |W - W_r|^p, p = 0.7):

    e = sign(d) max(|d| - |d|^(p-1) / beta, 0),   d = W - W_r,   beta = 10
    z = mean over the group of (q - (W - e) / scale)

at most 20 times, and for each group only as long as the mean of |W - W_r| falls. Scales stay those of the range. The
library keeps z as it is; layouts with whole zero points get the nearest one.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; mobiusml/hqq
(hqq/core/optimize.py, `optimize_weights_proximal_legacy`).
"""

from __future__ import annotations

from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.rtn import RoundToNearest, scales_and_zeros
from llmkit.quantization.statistics import Statistics

_NORM, _BETA, _MOST_STEPS = 0.7, 10.0, 20


class HalfQuadratic(RoundToNearest):
    """Every row from itself alone."""

    name = "hqq"
    words = "by HQQ, on zero points of the least sparse error"
    needs_zeros = True
    takes_points = False

    def scales(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales, zeros = scales_and_zeros(weight, grid, scale_dtype)
        if zeros is None:
            return scales, None
        exact = half_quadratic_zeros(weight, scales.float(), zeros.float(), grid)
        return scales, exact.round_().clamp_(grid.lowest_zero - grid.middle, grid.middle - 1).to(torch.int8)


def half_quadratic_zeros(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Zero points, between two codes mostly, as points on the grid.

    Args:
        weight: float32 [out, groups, size].
        scales, zeros: float32 [out, groups], where to begin; zeros as points.
    """
    q_min, q_max = -grid.middle, grid.middle - 1
    scale, zero = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    steps = weight / scale
    least = torch.full_like(zero, torch.inf)
    falls = torch.ones_like(zero, dtype=torch.bool)
    for _ in range(_MOST_STEPS):
        q = (steps + zero).round_().clamp_(q_min, q_max)
        difference = weight - (q - zero) * scale
        size = difference.abs()
        mean = size.mean(-1, keepdim=True)
        error = (size - size.pow(_NORM - 1) / _BETA).clamp_min_(0).mul_(difference.sign())
        zero = torch.where(falls, (q - (weight - error) / scale).mean(-1, keepdim=True), zero)
        falls &= mean < least
        if not bool(falls.any()):
            break
        least = mean
    return zero.squeeze(-1)


METHOD = HalfQuadratic()
