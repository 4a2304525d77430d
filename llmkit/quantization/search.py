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
        rows = slice(start, start + step)
        scale, zero = _best_of_rows(weight[rows], grid, scale_dtype, importance)
        scales[rows] = scale
        if zeros is not None and zero is not None:
            zeros[rows] = zero
    return scales, zeros


def _best_of_rows(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    widest, zero = scales_and_zeros(weight, grid, scale_dtype)
    q_min, q_max = -grid.middle, grid.middle - 1
    tiny = torch.finfo(scale_dtype).tiny
    candidates: list[torch.Tensor | None] = [None]
    if zero is not None:
        low, high = weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)
        exact = (q_min - low * (q_max - q_min) / (high - low)).nan_to_num_(nan=float(q_min))
        lowest = q_min + grid.lowest_zero
        candidates = [exact.floor().clamp_(lowest, q_max), exact.ceil().clamp_(lowest, q_max)]
    best, best_zero = widest, zero
    points = grid.points
    # A symmetric grid holds both ends at the larger factor; with a zero point, half a step more that rounding it cuts.
    n_steps = q_max - q_min
    largest = (n_steps + 1) / n_steps if zero is not None else n_steps / (2 * q_max) if q_max > 1 else 1.0
    largest = 1.0 if points is not None else largest  # both ends are points there
    # The device is named: once transformers has loaded a model, torch.linspace does not know the default one.
    factors = torch.linspace(largest, _SMALLEST, _N_FACTORS, device=weight.device)
    least = torch.full_like(widest, torch.inf, dtype=torch.float32)
    best_factor = torch.ones_like(least)
    nearest = torch.empty_like(weight)
    error = nearest if zero is None else torch.empty_like(weight)  # both zero points tried share the rounded weights

    def judge(factor: torch.Tensor) -> None:
        """Compare the scales at a factor of each group, [out, groups]."""
        nonlocal best, best_zero, least, best_factor
        scale = (widest.float() * factor).to(scale_dtype).clamp_(min=tiny)
        wide = scale.float().unsqueeze(-1)
        torch.div(weight, wide, out=nearest)
        if points is not None:
            nearest.copy_(points.numbers(points.codes(nearest)))
        elif zero is None:
            nearest.round_().clamp_(q_min, q_max)
        else:
            nearest.round_()
        for candidate in candidates:
            if candidate is not None:
                offset = candidate.unsqueeze(-1)
                torch.maximum(nearest, q_min - offset, out=error)  # five times as fast as `clamp` between tensors
                torch.minimum(error, q_max - offset, out=error)
            error.mul_(wide).sub_(weight).square_()
            total = error.mul_(importance if importance is not None else error).sum(-1)
            is_better = total < least
            least = torch.where(is_better, total, least)
            best, best_factor = torch.where(is_better, scale, best), torch.where(is_better, factor, best_factor)
            if best_zero is not None and candidate is not None:
                best_zero = torch.where(is_better, candidate.to(torch.int8), best_zero)

    for factor in (torch.ones(()), *factors):  # the range as it is first: the result is never worse
        judge(factor.expand_as(least))
    middle, distance = best_factor, float(factors[0] - factors[1])
    for share in _FINER:
        judge(middle + share * distance)
    return best, best_zero
