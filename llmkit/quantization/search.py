"""Scales and zero points with the least error, each column weighted by how large its inputs are.

The range of a group is shrunk (or widened: until a symmetric grid holds both ends, or by what a rounded zero point cuts
off) by several factors, and then by finer ones about the best; for each, every weight is rounded and

    sum over columns of importance * |w - w'|^p

is compared. Importance is the mean of x^2 over calibration tokens, and p is 2. Where nothing was measured all columns
count the same, and p is 4: large weights tend to lie where inputs are large, and the square clips too many of them.
(SmolLM2-135M in int4, groups of 64, symmetric and asymmetric: perplexity 27.7 and 24.5 round to nearest, 26.9 and 26.9
with p = 2, 25.6 and 24.3 with 4; the first six windows of 1,024 tokens of a part of WikiText-2.)
With zero points both whole numbers beside the exact one are tried. The scale is rounded to its stored dtype before it
is judged.

Sources: llama.cpp's `make_qx_quants` (weights of the error), AWQ (Lin et al. 2023, arXiv:2306.00978, clipping).
"""

from __future__ import annotations

from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import BLOCK_NBYTES, Grid
from llmkit.quantization.methods.rtn import scales_and_zeros
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.stopped import raise_if_stopped

_N_FACTORS, _SMALLEST = 16, 0.5
_FINER = (0.75, 0.5, 0.25, -0.25, -0.5, -0.75)  # of the distance of two factors


def importance_of(statistics: Statistics | None, shape: tuple[int, int] | torch.Size) -> torch.Tensor | None:
    """The mean of x^2 of each input channel as float32 [groups, size], 0 where the last group has no column.

    None where it was not measured, or no input was ever other than zero.
    """
    if statistics is None:
        return None
    mean = statistics.mean_squares
    if mean is None:
        return None
    n_groups, size = shape
    return torch.nn.functional.pad(mean, (0, n_groups * size - len(mean))).view(n_groups, size)


def searched_scales(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best scale of each group of float32 weights [out, groups, size], and its zero point.

    Args:
        importance: float32 [groups, size], of each column; None: all count the same.

    Returns:
        As `scales_and_zeros`: scales in `scale_dtype`, zero points as q (int8) or None; both [out, groups].
    """
    n_out, n_groups, size = weight.shape
    scales = torch.empty((n_out, n_groups), dtype=scale_dtype)
    zeros = None if grid.is_symmetric else torch.empty((n_out, n_groups), dtype=torch.int8)
    step = max(BLOCK_NBYTES // (4 * n_groups * size), 1)
    for start in range(0, n_out, step):
        raise_if_stopped()
        rows = slice(start, start + step)
        scale, zero = _best_of_rows(weight[rows], grid, scale_dtype, importance)
        scales[rows] = scale
        if zeros is not None and zero is not None:
            zeros[rows] = zero
    return scales, zeros


def _best_of_rows(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    search = _Search(weight, grid, scale_dtype, importance)
    # A symmetric grid holds both ends at the larger factor; with a zero point, half a step more that rounding it cuts.
    n_steps, q_max = 2 * grid.middle - 1, grid.middle - 1
    if grid.points is not None:  # both ends are points
        largest = 1.0
    elif search.zero is not None:
        largest = (n_steps + 1) / n_steps
    else:
        largest = n_steps / (2 * q_max) if q_max > 1 else 1.0
    # The device is named: once transformers has loaded a model, torch.linspace does not know the default one.
    factors = torch.linspace(largest, _SMALLEST, _N_FACTORS, device=weight.device)
    for factor in (torch.ones(()), *factors):  # the range as it is first: the result is never worse
        search.judge(factor.expand_as(search.factor))
    middle, distance = search.factor, float(factors[0] - factors[1])
    for share in _FINER:
        search.judge(middle + share * distance)
    return search.scale, search.zero


class _Search:
    """The best scale so far of each group of float32 weights [out, groups, size].

    Attributes:
        scale: [out, groups], in the dtype of scales; before any factor is judged, that of the range.
        zero: the zero point that goes with it as q (int8), [out, groups]; None for a grid without.
        factor: what the scale of the range is multiplied with, float32 [out, groups].
    """

    def __init__(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, importance: torch.Tensor | None
    ) -> None:
        self._weight, self._importance, self._points = weight, importance, grid.points
        self._tiny = torch.finfo(scale_dtype).tiny
        self._q_min, self._q_max = -grid.middle, grid.middle - 1
        self._widest, self.zero = scales_and_zeros(weight, grid, scale_dtype)
        self._zeros = self._zeros_tried(grid.lowest_zero) if self.zero is not None else []
        self.scale = self._widest
        self._least = torch.full_like(self._widest, torch.inf, dtype=torch.float32)
        self.factor = torch.ones_like(self._least)
        self._nearest = torch.empty_like(weight)
        # Both zero points tried share the rounded weights.
        self._error = self._nearest if self.zero is None else torch.empty_like(weight)

    def _zeros_tried(self, lowest: int) -> list[torch.Tensor]:
        """The two whole numbers beside the exact zero point."""
        low, high = self._weight.amin(-1).clamp_(max=0), self._weight.amax(-1).clamp_(min=0)
        exact = self._q_min - low * (self._q_max - self._q_min) / (high - low)
        exact.nan_to_num_(nan=float(self._q_min))
        bounds = self._q_min + lowest, self._q_max
        return [exact.floor().clamp_(*bounds), exact.ceil().clamp_(*bounds)]

    def judge(self, factor: torch.Tensor) -> None:
        """Take the scale at a factor of each group, float32 [out, groups], where its squared error is less."""
        scale = (self._widest.float() * factor).to(self._widest.dtype).clamp_(min=self._tiny)
        wide = scale.float().unsqueeze(-1)
        nearest = torch.div(self._weight, wide, out=self._nearest)
        if self._points is not None:
            nearest.copy_(self._points.numbers(self._points.codes(nearest)))
        elif self.zero is None:
            nearest.round_().clamp_(self._q_min, self._q_max)
        else:
            nearest.round_()
        if self.zero is None:
            self._keep_better(factor, scale, None)
        for zero in self._zeros:
            offset = zero.unsqueeze(-1)
            torch.maximum(nearest, self._q_min - offset, out=self._error)  # five times as fast as `clamp` of tensors
            torch.minimum(self._error, self._q_max - offset, out=self._error)
            self._keep_better(factor, scale, zero)

    def _keep_better(self, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        """Compare the rounded weights that `_error` holds."""
        error = self._error.mul_(scale.float().unsqueeze(-1)).sub_(self._weight).square_()
        total = error.mul_(self._importance if self._importance is not None else error).sum(-1)
        is_better = total < self._least
        self._least = torch.where(is_better, total, self._least)
        self.scale = torch.where(is_better, scale, self.scale)
        self.factor = torch.where(is_better, factor, self.factor)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(is_better, zero.to(torch.int8), self.zero)
