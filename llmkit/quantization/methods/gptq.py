"""GPTQ: each column is rounded in turn, and the error it makes is taken up by the columns that follow.

With H = sum of x x^T over calibration tokens, rounding column j by e changes the output least when the later columns
move by -e U[j, j+1:] / U[j, j], where U is the upper Cholesky factor of the inverse of H. Columns come in the order of
falling diag(H). Scales and zero points are those of the original groups, searched beforehand for the least weighted
error, so that groups stay neighbours and no order is stored ("static groups").

H is damped by 1 % of its mean diagonal, and by ten times as much as often as its factorization fails. A column that no
token reached is rounded to nearest, as in the original; here its weights are not zeroed.

Source: Frantar et al. 2022, arXiv:2210.17323; IST-DASLab/gptq (gptq.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import Method, QuantizedRows
from llmkit.quantization.methods.rtn import quantized_rows
from llmkit.quantization.search import importance_of, searched_scales
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.finite import require_finite

if TYPE_CHECKING:
    import torch

__all__ = ["GPTQ", "METHOD"]

_DAMPING, _MOST_DAMPING = 0.01, 10.0
_N_COLUMNS = 128  # corrected one by one; those behind them by one product


class GPTQ(Method):
    """A whole matrix at a time, from the second moments of its inputs."""

    name = "gptq"
    words = "by GPTQ, on the grid with the least weighted error"
    needs = frozenset({"second_moments"})
    is_row_wise = False

    def quantize(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None = None
    ) -> QuantizedRows:
        import torch

        if statistics is None or statistics.second_moments is None:
            raise InputError("GPTQ needs the second moments of the inputs", hint="--calibration FILE measures them")
        moments = statistics.second_moments.float()
        require_finite(moments, moments, what="activations of the calibration text")
        n_out, n_in = weight.shape
        n_groups, size = grid.n_groups(n_in), grid.group_size or n_in
        original = weight.float()
        filled = torch.nn.functional.pad(original, (0, n_groups * size - n_in)).view(n_out, n_groups, size)
        scales, zeros = searched_scales(filled, grid, scale_dtype, importance_of(statistics, (n_groups, size)))
        order = moments.diagonal().argsort(descending=True, stable=True)
        groups = order // size
        factor, damping = _factor(moments[order][:, order])
        q = _rounded(original[:, order].T.contiguous(), factor, scales, zeros, groups, grid)
        in_place = torch.empty((n_out, n_in), dtype=torch.int8)
        in_place[:, order] = q.T
        note = f"the second moments of inputs are damped by {damping:g} of their mean" if damping > _DAMPING else ""
        return quantized_rows(original, in_place, scales, zeros, grid, note)


def _factor(moments: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of damped second moments [in, in], float32; and the damping it took."""
    import torch

    diagonal = moments.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(len(moments)), _DAMPING
    damped = moments.clone()
    damped.diagonal()[diagonal == 0] = mean
    damping = _DAMPING
    while damping <= _MOST_DAMPING:
        trial = damped.clone()
        trial.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(trial)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping *= 10
    raise InputError(
        "the second moments of the inputs cannot be factored", hint="calibrate on a longer text, or use --method mse"
    )


def _rounded(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Points on the grid, int8 [in, out].

    Args:
        columns: of the weight, float32 [in, out]; scratch afterwards.
        factor: upper, [in, in].
        scales, zeros: [out, groups]; zeros as points on the grid.
        groups: [in], the group of each column.
    """
    import torch

    n_in = len(columns)
    q_min, q_max = -grid.middle, grid.middle - 1
    by_group = scales.float().T.contiguous()
    offsets = None if zeros is None else zeros.float().T.contiguous()
    q = torch.empty(columns.shape, dtype=torch.int8)
    diagonal, of_column = factor.diagonal().tolist(), groups.tolist()
    for start in range(0, n_in, _N_COLUMNS):
        stop = min(start + _N_COLUMNS, n_in)
        block, upper = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            scale, column = by_group[of_column[start + j]], block[j]
            point = column / scale
            if offsets is None:
                point = point.round_().clamp_(q_min, q_max)
                restored = point * scale
            else:
                offset = offsets[of_column[start + j]]
                point = point.add_(offset).round_().clamp_(q_min, q_max)
                restored = (point - offset).mul_(scale)
            q[start + j] = point
            torch.sub(column, restored, out=errors[j]).div_(diagonal[start + j])
            if j + 1 < len(block):
                block[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        if stop < n_in:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return q


METHOD = GPTQ()
