"""GPTQ: each column is rounded in turn, and the error it makes is taken up by the columns that follow.

With H = sum of x x^T over calibration tokens, rounding column j by e changes the output least when the later columns
move by -e U[j, j+1:] / U[j, j], where U is the upper Cholesky factor of the inverse of H. Columns come in the order of
falling diag(H).

Scales and zero points have the least weighted error. They are those of the original groups, searched beforehand, so
that groups stay neighbours and no order is stored ("static groups"); or, with `act_order`, columns are grouped as they
come, each group's are searched when its first column is reached, and the group of each column is stored (`desc_act`).

Where x is unlike the input f that the model in floats has in its place, what is rounded is not the weight W but
W + a W C H^-1, C being the sum of (f - x) x^T: with a = 1 the least error of the outputs for x beside W f.

Afterwards scales and codes are changed in turn while the error falls (llmkit/quantization/refinement.py).

H is damped by 1 % of its mean diagonal, and by ten times as much as often as its factorization fails. A column that no
token reached is rounded to nearest, as in the original; here its weights are not zeroed.

Sources: Frantar et al. 2022, arXiv:2210.17323; IST-DASLab/gptq (gptq.py); Li et al. 2025, arXiv:2504.02692 (GPTAQ);
Arai and Ichikawa 2025, arXiv:2504.09629 (the correction and its share a).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakKeyDictionary

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import N_WINDOWS, Method, QuantizedRows
from llmkit.quantization.methods.rtn import quantized_rows
from llmkit.quantization.refinement import N_COLUMNS, Grids, Inputs, refine
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.products import add_product, inverse_of_lower
from llmkit.tensors.stopped import raise_if_stopped

_DAMPING, _MOST_DAMPING = 0.01, 10.0
_CORRECTION = 0.5  # the share a
_N_SWEEPS = {1: 4, 2: 4, 3: 4, 4: 2}  # of the refinement, by bits: with more of them rounding is nearly exact


class GPTQ(Method):
    """A whole matrix at a time, from the second moments of its inputs.

    Args:
        gives_corrected: `QuantizedRows.corrected` is there, for methods that start where this one ends.
        n_windows: as of `Method`.
    """

    name = "gptq"
    words = "by GPTQ, on the grid with the least weighted error"
    needs = frozenset({"second_moments"})
    uses = frozenset({"cross_moments"})
    is_row_wise = False
    takes_points = True
    _refines: ClassVar[bool] = True

    def __init__(self, *, gives_corrected: bool = False, n_windows: int = N_WINDOWS) -> None:
        self._gives_corrected, self._has_act_order, self.n_windows = gives_corrected, False, n_windows

    def configured(self, *, iterations: int | None = None, act_order: bool | None = None) -> Self:
        made = copy.copy(super().configured(iterations=iterations))
        made._has_act_order = bool(act_order)
        return made

    def attrs(self) -> dict[str, Any]:
        return {**super().attrs(), **({"act_order": True} if self._has_act_order else {})}

    def gives_order(self, grid: Grid) -> bool:
        return self._has_act_order and grid.group_size is not None

    def quantize(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None = None
    ) -> QuantizedRows:
        if statistics is None or statistics.second_moments is None:
            raise InputError("GPTQ needs the second moments of the inputs", hint="--calibration FILE measures them")
        n_out, n_in = weight.shape
        original = weight.float()
        if statistics not in _KNOWN:
            _KNOWN[statistics] = _factored(statistics.second_moments.float())
        order, factor, damping = _KNOWN[statistics]
        in_place = order.argsort()
        columns = original[:, order].T.contiguous()
        if "cross_moments" in self.uses and (cross := statistics.crossed(original)) is not None:
            turned = add_product(torch.empty_like(columns), factor, cross[:, order].T, beta=0)
            add_product(columns, factor.T, turned, alpha=_CORRECTION)
        grids = Grids(n_out, n_in, grid, scale_dtype)
        importance = statistics.mean_squares
        size = grid.group_size or n_in
        n_sweeps = _N_SWEEPS.get(grid.bits, 0) if self._refines else 0
        wanted = columns.clone() if n_sweeps else columns
        if self.gives_order(grid):
            by_rank = importance[order] if importance is not None else None
            groups = torch.arange(n_in) // size

            def begin(first: int, own: torch.Tensor) -> None:
                """Search the grid of the group whose columns [size, out] come from place `first` on."""
                weights = by_rank[first : first + size] if by_rank is not None else None
                grids.search(first // size, own, weights)

            q = _rounded(columns, factor, groups, grids, begin)
            stored, grouped = groups[in_place].int(), torch.arange(n_in)
        else:
            grids.search(0, columns[in_place], importance)
            q, stored, grouped = _rounded(columns, factor, order // size, grids), None, in_place
        columns, q = (wanted if n_sweeps else columns)[grouped], q[grouped]
        if n_sweeps:
            moments = statistics.second_moments.float()
            added = damping * float(moments.diagonal().mean())
            inputs = Inputs(moments if stored is None else moments[order][:, order], added)
            refine(columns, q, grids, inputs, n_sweeps)
        if stored is not None:
            columns, q = columns[in_place], q[in_place]
        note = f"the second moments of inputs are damped by {damping:g} of their mean" if damping > _DAMPING else ""
        scales, zeros = grids.scales.T, grids.zeros_of_rows
        corrected = columns.T if self._gives_corrected else None
        return quantized_rows(original, q.T, scales, zeros, grid, stored, note, corrected)


class _Factored(NamedTuple):
    """Second moments [in, in], once they are damped.

    Attributes:
        order: int64 [in], the columns by falling moments.
        factor: the upper Cholesky factor U of their inverse, U^T U, columns in this order; float32.
        damping: the share of the mean diagonal that was added.
    """

    order: torch.Tensor
    factor: torch.Tensor
    damping: float


_KNOWN: WeakKeyDictionary[Statistics, _Factored] = WeakKeyDictionary()  # layers that share inputs share this, too


def _factored(moments: torch.Tensor) -> _Factored:
    """Of second moments [in, in], float32: with the columns the other way round they are L L^T, and U is L^-1."""
    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    mean = float(diagonal.mean())
    if mean <= 0:
        return _Factored(order, torch.eye(len(moments)), _DAMPING)
    backwards = order.flip(0)
    damped = moments[backwards][:, backwards]
    damped.diagonal()[diagonal[backwards] == 0] = mean
    damping, added = _DAMPING, 0.0
    while damping <= _MOST_DAMPING:
        raise_if_stopped()
        damped.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = inverse_of_lower(lower)
            if bool(torch.isfinite(inverse).all()):
                return _Factored(order, inverse.flip(0, 1), damping)
        damping *= 10
    raise InputError(
        "the second moments of the inputs cannot be factored", hint="calibrate on a longer text, or use --method mse"
    )


def _rounded(
    columns: torch.Tensor,
    factor: torch.Tensor,
    groups: torch.Tensor,
    grids: Grids,
    begin: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Points on the grid, int8 [in, out].

    Args:
        columns: of the weight, float32 [in, out]; afterwards each as it was when it was rounded.
        factor: upper, [in, in].
        groups: [in], the group of each column.
        begin: searches the grid of a group when its first column is reached; None where that is done.
    """
    n_in, size = len(columns), grids.group_size
    q = torch.empty(columns.shape, dtype=torch.int8)
    diagonal, of_column = factor.diagonal().tolist(), groups.tolist()
    step = grids.n_columns if begin is not None else N_COLUMNS
    for start in range(0, n_in, step):
        raise_if_stopped()
        stop = min(start + step, n_in)
        block, upper = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            if begin is not None and (start + j) % size == 0:
                begin(start + j, columns[start + j : start + j + size])
            q[start + j], restored = grids.nearest(of_column[start + j], block[j])
            torch.sub(block[j], restored, out=errors[j]).div_(diagonal[start + j])
            if j + 1 < len(block):
                block[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        if stop < n_in:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return q


class FastGPTQ(GPTQ):
    """As the original has it, on the searched grid: no float model is carried along, and nothing is refined."""

    name = "gptq-fast"
    words = "by GPTQ without correction and refinement, on the grid with the least weighted error"
    uses = frozenset()
    _refines = False


METHOD, OF_MORE_TEXT, FAST = GPTQ(), GPTQ(n_windows=2 * N_WINDOWS), FastGPTQ()
