"""AWQ: columns whose inputs are large are multiplied by a scale before rounding, and their inputs divided by it.

The error of a column is then divided by its scale; a scale costs where it widens the grid of its group. With x the root
mean square of each input channel, and w the mean over rows of |W| relative to the largest of its group, tried are

    s = x^a      and      s = x^a / w^(1 - a)      for a = 0.2, 0.4, … 1, then 0.1 about the best; and s = 1

each for the grid that is searched for the scaled weights, and taken is that with the least error of the outputs,
tr(E H E^T) with H = sum of x x^T. Clipping is part of that search. One number is chosen for a whole input, and so it is
enough to try `_N_ROWS` rows of all weights that read it, evenly spaced.

The original has the mean of |x| instead, searches the scale on the grid of the range, and clips afterwards. A channel
that no token reached, or that all weights leave out, keeps its scale of 1 here.

Source: Lin et al. 2023, arXiv:2306.00978; casper-hansen/AutoAWQ (awq/quantize/quantizer.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import BlockWeight, ScalingMethod
from llmkit.quantization.methods.gptq import GPTQ
from llmkit.quantization.methods.mse import LeastSquares
from llmkit.quantization.search import searched_scales
from llmkit.tensors.stopped import raise_if_stopped

_N_ROWS = 512
_EXPONENTS, _FINER = (0.2, 0.4, 0.6, 0.8, 1.0), (-0.1, 0.1)


class _Scaled(ScalingMethod):
    """The scale, whatever rounds the weights afterwards."""

    def input_scales(self, weights: Sequence[BlockWeight], source: torch.Tensor) -> torch.Tensor:
        known = weights[0].statistics
        if known is None or known.second_moments is None:
            raise InputError("AWQ needs the second moments of the inputs", hint="--calibration FILE measures them")
        moments = known.second_moments.float() / max(known.n_tokens, 1)
        by_grid: dict[tuple[Grid, torch.dtype], list[torch.Tensor]] = {}
        for each in weights:
            by_grid.setdefault((each.grid, each.scale_dtype), []).append(each.weight)
        trials = [_Trial(given, *points, moments) for points, given in by_grid.items()]
        x = _of_outputs(moments.diagonal().sqrt(), source)
        w = _of_outputs(torch.cat([trial.relative() for trial in trials]).mean(0), source)
        is_live = (x > 0) & (w > 0)
        best = torch.ones_like(x)
        if not bool(is_live.any()):
            return best
        log_x, log_w = x.log(), w.log()
        least, at = sum(trial.error(best[source]) for trial in trials), (0.0, False)

        def judge(exponent: float, is_relative: bool) -> None:
            nonlocal best, least, at
            raise_if_stopped()
            log = exponent * log_x - ((1 - exponent) * log_w if is_relative else 0)
            scale = (log - log[is_live].mean()).exp().where(is_live, 1.0)
            error = sum(trial.error(scale[source]) for trial in trials)
            if error < least:
                best, least, at = scale, error, (exponent, is_relative)

        for is_relative in (False, True):
            for exponent in _EXPONENTS:
                judge(exponent, is_relative)
        middle, is_relative = at
        for distance in _FINER:
            judge(middle + distance, is_relative)
        return best


class AWQ(_Scaled, LeastSquares):
    """Scaled weights, rounded to nearest on the grid with the least weighted error."""

    name = "awq"
    words = "scaled by AWQ, then rounded to nearest on the grid with the least error"
    needs = frozenset({"second_moments"})
    uses = frozenset()


class AWQThenGPTQ(_Scaled, GPTQ):
    """Scaled weights, rounded by GPTQ."""

    name = "awq-gptq"
    words = "scaled by AWQ, then by GPTQ, on the grid with the least weighted error"


class _Trial:
    """Some rows of weights [out, in] on one grid, as they come out of it when their columns are scaled."""

    def __init__(
        self, weights: Sequence[torch.Tensor], grid: Grid, scale_dtype: torch.dtype, moments: torch.Tensor
    ) -> None:
        whole = torch.cat(list(weights))
        self._rows = whole[:: -(-len(whole) // _N_ROWS)].float()
        self._share = len(self._rows) / len(whole)
        n_in = self._rows.shape[1]
        self._grid, self._dtype, self._moments = grid, scale_dtype, moments
        self._shape = grid.n_groups(n_in), grid.group_size or n_in

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """[…, in] as [rows, groups, size]; what the last group lacks is 0."""
        missing = self._shape[0] * self._shape[1] - values.shape[-1]
        return torch.nn.functional.pad(values, (0, missing)).view(-1, *self._shape)

    def relative(self) -> torch.Tensor:
        """|W| beside the largest of its group, float32 [rows, in]."""
        size = self._grouped(self._rows).abs()
        relative = (size / size.amax(-1, keepdim=True)).nan_to_num_(nan=0.0)
        return relative.flatten(1)[:, : self._rows.shape[1]]

    def error(self, scale: torch.Tensor) -> float:
        """About the mean squared error of the outputs, summed over all rows; `scale` of the columns, float32 [in]."""
        filled = self._grouped(self._rows * scale)
        importance = self._grouped(self._moments.diagonal() / scale.square())[0]
        steps, zeros = searched_scales(filled, self._grid, self._dtype, importance)
        wide, middle, points = steps.float().unsqueeze(-1), self._grid.middle, self._grid.points
        zero = 0 if zeros is None else zeros.unsqueeze(-1)
        if points is not None:
            nearest = points.numbers(points.codes(filled / wide))
        else:
            nearest = (filled / wide + zero).round_().clamp_(-middle, middle - 1).sub_(zero)
        lost = (nearest.mul_(wide) - filled).flatten(1)[:, : len(scale)] / scale
        return float((lost @ self._moments).mul_(lost).sum()) / self._share


def _of_outputs(values: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The mean over the columns that each output makes, of values [in]."""
    n = int(source.max()) + 1
    sums, counts = torch.zeros((2, n)).unbind()
    return sums.index_add_(0, source, values) / counts.index_add_(0, source, torch.ones_like(values))


METHOD, WITH_GPTQ = AWQ(), AWQThenGPTQ()
