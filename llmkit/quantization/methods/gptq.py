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

`best` looks at how the output of the decoder block moves with the outputs of a layer, too: where that is known, rows
are rounded some after the others (llmkit/quantization/feedback.py).

H is damped by 1 % of its mean diagonal, and by ten times as much as often as its factorization fails. A column that no
token reached is rounded to nearest, as in the original; here its weights are not zeroed.

Sources: Frantar et al. 2022, arXiv:2210.17323; IST-DASLab/gptq (gptq.py); Li et al. 2025, arXiv:2504.02692 (GPTAQ);
Arai and Ichikawa 2025, arXiv:2504.09629 (the correction and its share a).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.quantization.factored import Factored, factored
from llmkit.quantization.feedback import rounded_with_feedback
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import N_WINDOWS, Method, QuantizedRows
from llmkit.quantization.methods.rtn import quantized_rows
from llmkit.quantization.refinement import N_COLUMNS, Grids, Inputs, refine
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.products import add_product
from llmkit.tensors.stopped import raise_if_stopped

if TYPE_CHECKING:
    from torch.utils.weak import WeakTensorKeyDictionary

_DAMPING = 0.01
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
        original, moments, grids = weight.float(), statistics.second_moments, Grids(n_out, n_in, grid, scale_dtype)
        if moments not in _known():
            _known()[moments] = factored(moments.float(), _DAMPING)
        order, factor, damping = known = _known()[moments]
        columns = original[:, order].T.contiguous()
        if "cross_moments" in self.uses and (cross := statistics.crossed(original)) is not None:
            turned = add_product(torch.empty_like(columns), factor, cross[:, order].T, beta=0)
            add_product(columns, factor.T, turned, alpha=_CORRECTION)
        has_order, n_sweeps = self.gives_order(grid), _N_SWEEPS.get(grid.bits, 0) if self._refines else 0
        rounding = _Rounding(known, moments.float(), statistics.mean_squares, has_order, n_sweeps)
        if "output_moments" in self.uses and (outputs := statistics.output_moments) is not None:
            q, columns = rounded_with_feedback(columns, grids, outputs.float(), rounding, rounding.grouped)
        else:
            q, columns = rounding(columns, grids)
        stored = None
        if has_order:
            in_place = order.argsort()
            q, columns, stored = q[in_place], columns[in_place], (in_place // grids.group_size).int()
        note = f"the second moments of inputs are damped by {damping:g} of their mean" if damping > _DAMPING else ""
        corrected = columns.T if self._gives_corrected else None
        return quantized_rows(original, q.T, grids.scales.T, grids.zeros_of_rows, grid, stored, note, corrected)


@dataclass(frozen=True, eq=False)
class _Rounding:
    """How columns are rounded, of whichever rows.

    Attributes:
        known: the moments, factored.
        moments: of the inputs, float32 [in, in].
        importance: [in], of the columns in a search of grids.
        has_order: columns are grouped as they come.
        n_sweeps: of the refinement.
    """

    known: Factored
    moments: torch.Tensor
    importance: torch.Tensor | None
    has_order: bool
    n_sweeps: int

    @cached_property
    def grouped(self) -> torch.Tensor:
        """int64 [in], the columns in the order of their groups."""
        return torch.arange(len(self.known.order)) if self.has_order else self.known.order.argsort()

    @cached_property
    def inputs(self) -> Inputs:
        """Of the refinement, columns in the order of groups."""
        order, _, damping = self.known
        moments = self.moments[order][:, order] if self.has_order else self.moments
        return Inputs(moments, damping * float(self.moments.diagonal().mean()))

    def __call__(self, columns: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, torch.Tensor]:
        """Points, int8, and what they are nearest to, [in, rows] in the order of groups.

        Args:
            columns: of the wanted rows, float32 [in, rows] in the order in which they come; changed in place.
        """
        order, factor, _ = self.known
        size, grouped = grids.group_size, self.grouped
        wanted = columns.clone() if self.n_sweeps else columns
        if self.has_order:
            by_rank = self.importance[order] if self.importance is not None else None

            def begin(first: int, own: torch.Tensor) -> None:
                """Search the grid of the group whose columns [size, rows] come from place `first` on."""
                grids.search(first // size, own, by_rank[first : first + size] if by_rank is not None else None)

            q = _rounded(columns, factor, torch.arange(len(order)) // size, grids, begin)
        else:
            grids.search(0, columns[grouped], self.importance)
            q = _rounded(columns, factor, order // size, grids)
        wanted, q = wanted[grouped], q[grouped]
        if self.n_sweeps:
            refine(wanted, q, grids, self.inputs, self.n_sweeps)
        return q, wanted


@cache
def _known() -> WeakTensorKeyDictionary:
    """Second moments -> `Factored`: layers that share inputs share this, too."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


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
    """As the original has it, on the searched grid: only what the layer itself gets counts, and nothing is refined."""

    name = "gptq-fast"
    words = "by GPTQ without correction and refinement, on the grid with the least weighted error"
    uses = frozenset()
    _refines = False


class BestGPTQ(GPTQ):
    """Rows of attention's projections take up the errors of those that were rounded before them."""

    name = "best"
    words = "by GPTQ with feedback of rows, on the grid with the least weighted error"
    uses = GPTQ.uses | {"output_moments"}


METHOD, BEST, FAST = GPTQ(), BestGPTQ(n_windows=2 * N_WINDOWS), FastGPTQ()
