"""A rounded matrix whose scales and codes are changed in turn, while the error of its outputs falls.

With moments H of the inputs and the wanted weight W, damped by d, the error of a row is e (H + d) e^T, e being its row
of W - W'. In a sweep each group of columns in turn takes

1. the scale that has the least error, all points and the other scales as they are: the error is quadratic in it. The
   old one stays where the new one, in the stored dtype and above 0, has no less error;
2. and then for each of its columns the points that have the least error, all others as they are.

This is coordinate descent, and no step makes the error larger. Zero points stay: layouts store them as whole numbers.

Source of the second step: QuantEase (Behdin et al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.rtn import to_points
from llmkit.quantization.search import searched_scales
from llmkit.tensors.products import add_product
from llmkit.tensors.stopped import raise_if_stopped

N_COLUMNS = 128  # whose errors are kept up one by one; of those behind them by one product
_N_ROWS = 1024  # of the matrix, that are worked on at a time


class Grids:
    """The scales [groups, out] of a matrix, and its zero points as points, int8; None on a symmetric grid."""

    def __init__(self, n_out: int, n_in: int, grid: Grid, scale_dtype: torch.dtype) -> None:
        self.grid, self.group_size = grid, grid.group_size or n_in
        shape = grid.n_groups(n_in), n_out
        self.scales = torch.ones(shape, dtype=scale_dtype)
        self.zeros = None if grid.is_symmetric else torch.zeros(shape, dtype=torch.int8)

    @property
    def n_columns(self) -> int:
        """Columns to work on at a time: whole groups, where they are small."""
        return N_COLUMNS // self.group_size * self.group_size if self.group_size <= N_COLUMNS else N_COLUMNS

    @property
    def zeros_of_rows(self) -> torch.Tensor | None:
        """Zero points [out, groups]."""
        return self.zeros.T if self.zeros is not None else None

    def search(self, first: int, columns: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Those with the least error for columns [n, out] of groups from `first` on, weighted by importance [n]."""
        missing = -len(columns) % self.group_size
        rows = torch.nn.functional.pad(columns.T, (0, missing)).view(columns.shape[1], -1, self.group_size)
        if importance is not None:
            importance = torch.nn.functional.pad(importance, (0, missing)).view(-1, self.group_size)
        scales, zeros = searched_scales(rows, self.grid, self.scales.dtype, importance)
        found = slice(first, first + rows.shape[1])
        self.scales[found] = scales.T
        if self.zeros is not None and zeros is not None:
            self.zeros[found] = zeros.T

    def of_rows(self, rows: slice | torch.Tensor) -> Grids:
        """Those of some output rows; views, where they are a slice."""
        part = copy.copy(self)
        part.scales, part.zeros = self.scales[:, rows], None if self.zeros is None else self.zeros[:, rows]
        return part

    def take(self, other: Grids) -> None:
        """Become those of the same rows in `other`."""
        self.scales, self.zeros = other.scales, other.zeros

    def nearest(self, group: int, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The points nearest to float32 numbers [out] of a group, and the numbers that they stand for."""
        scale, middle = self.scales[group].float(), self.grid.middle
        point = column / scale
        if self.grid.points is not None:
            codes = self.grid.points.codes(point)
            return to_points(codes, self.grid), self.grid.points.numbers(codes).mul_(scale)
        if self.zeros is None:
            point = point.round_().clamp_(-middle, middle - 1)
            return point, point * scale
        offset = self.zeros[group].float()
        point = point.add_(offset).round_().clamp_(-middle, middle - 1)
        return point, (point - offset).mul_(scale)

    def steps(self, q: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """What points [in, out] stand for in units of their scales, float32."""
        if self.grid.points is not None:
            return self.grid.points.numbers((q.int() + self.grid.middle).to(torch.uint8))
        return q.float() if self.zeros is None else q.float() - self.zeros.float()[groups]

    def restored(self, q: torch.Tensor) -> torch.Tensor:
        """What points [in, out] stand for, float32, groups being neighbouring columns."""
        groups = torch.arange(len(q)) // self.group_size
        return self.steps(q, groups).mul_(self.scales.float()[groups])


class Inputs(NamedTuple):
    """Moments of the inputs of a matrix, columns in the order of its groups.

    Attributes:
        moments: float32 [in, in].
        damping: what counts as added to their diagonal.
    """

    moments: torch.Tensor
    damping: float


def refine(columns: torch.Tensor, q: torch.Tensor, grids: Grids, inputs: Inputs, n_sweeps: int) -> None:
    """Change points and scales of a matrix in place, whose groups are neighbouring columns.

    Args:
        columns: of the wanted weight, float32 [in, out]; afterwards what the points are nearest to.
        q: points on the grid, int8 [in, out].
    """
    for start in range(0, columns.shape[1], _N_ROWS):
        rows = slice(start, start + _N_ROWS)
        part = _Rows(columns[:, rows].contiguous(), q[:, rows].contiguous(), grids.of_rows(rows), inputs)
        for _ in range(n_sweeps):
            part.sweep()
        columns[:, rows], q[:, rows] = part.nearest_to, part.q


class _Rows:
    """Some output rows of a matrix, columns first: [in, rows].

    Attributes:
        q: points, int8.
        nearest_to: what they are nearest to.
    """

    def __init__(self, wanted: torch.Tensor, q: torch.Tensor, grids: Grids, inputs: Inputs) -> None:
        self._wanted, self.q, self._grids, self._inputs = wanted, q, grids, inputs
        self.nearest_to = wanted.clone()
        self._groups = torch.arange(len(wanted)) // grids.group_size
        self._of_column = self._groups.tolist()
        self._curvature = (inputs.moments.diagonal() + inputs.damping).tolist()

    def sweep(self) -> None:
        """The scale of each group, and then each of its columns."""
        grids, moments, n_in = self._grids, self._inputs.moments, len(self._wanted)
        self._steps = grids.steps(self.q, self._groups)
        self._restored = self._steps * grids.scales.float()[self._groups]
        error = self._wanted - self._restored
        # (H + d) e, kept up from here on
        self._pull = add_product(error.clone(), moments, error, beta=self._inputs.damping)
        step = grids.n_columns
        for start in range(0, n_in, step):
            raise_if_stopped()
            stop = min(start + step, n_in)
            changes = torch.zeros_like(error[start:stop])  # of which the columns behind the block do not know yet
            for column in range(start, stop):
                if column % grids.group_size == 0:
                    self._fit(column, start, changes)
                self._round(column, start, changes)
            if stop < n_in:
                self._pull[stop:].addmm_(moments[stop:, start:stop], changes, alpha=-1)

    def _fit(self, first: int, start: int, changes: torch.Tensor) -> None:
        """The scales of the group from column `first` on; all columns are told of one that ends behind its block."""
        scales, stop = self._grids.scales[self._of_column[first]], start + len(changes)
        own = slice(first, min(first + self._grids.group_size, len(self._wanted)))
        told = slice(first, stop if own.stop <= stop else len(self._wanted))
        steps = self._steps[own]
        turned = self._inputs.moments[told, own] @ steps
        turned[: len(steps)].add_(steps, alpha=self._inputs.damping)
        curvature, slope = (turned[: len(steps)] * steps).sum(0), (self._pull[own] * steps).sum(0)
        old = scales.float()
        new = (old + slope / curvature).to(scales.dtype)
        change = new.float() - old
        is_better = (new.float() > 0) & torch.isfinite(change) & (change * (change * curvature - 2 * slope) < 0)
        change = torch.where(is_better, change, 0.0)
        scales.copy_(torch.where(is_better, new, scales))
        moved = steps * change
        self._restored[own] += moved
        self._pull[told].addcmul_(turned, change, value=-1)
        if own.stop <= stop:
            changes[first - start : own.stop - start] += moved

    def _round(self, column: int, start: int, changes: torch.Tensor) -> None:
        """The points of a column, for all others as they are; the rest of its block is told."""
        nearest_to, restored, stop = self.nearest_to[column], self._restored[column], start + len(changes)
        if self._curvature[column] > 0:
            torch.add(restored, self._pull[column], alpha=1 / self._curvature[column], out=nearest_to)
        else:
            nearest_to.copy_(self._wanted[column])
        self.q[column], number = self._grids.nearest(self._of_column[column], nearest_to)
        change = number.sub_(restored)
        changes[column - start] += change
        if column + 1 < stop:
            self._pull[column + 1 : stop].addr_(self._inputs.moments[column + 1 : stop, column], change, alpha=-1)
