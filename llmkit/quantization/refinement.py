"""A rounded matrix whose scales and codes are changed in turn, while the error of its outputs falls.

With moments H of the inputs and the wanted weight W, damped by d, the error of a row is e (H + d) e^T, e being its row
of W - W'. In a sweep

1. the scales of each row are solved for, its codes as they are: the error is quadratic in them. A row keeps its old
   scales where the new ones, in the stored dtype and above 0, have no less error;
2. each column in turn takes the points that have the least error, all others as they are (coordinate descent).

Neither step makes the error larger. Zero points stay: layouts store them as whole numbers.

Source of the second step: QuantEase (Behdin et al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

from typing import NamedTuple

from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.rtn import to_points
from llmkit.quantization.search import searched_scales

_N_COLUMNS = 128  # whose errors are kept up one by one; of those behind them by one product
_N_ROWS = 1024  # of the matrix, that are worked on at a time


class Grids:
    """The scales [groups, out] of a matrix, and its zero points as points, int8; None on a symmetric grid."""

    def __init__(self, n_out: int, n_in: int, grid: Grid, scale_dtype: torch.dtype) -> None:
        self.grid, self.group_size = grid, grid.group_size or n_in
        shape = grid.n_groups(n_in), n_out
        self.scales = torch.ones(shape, dtype=scale_dtype)
        self.zeros = None if grid.is_symmetric else torch.zeros(shape, dtype=torch.int8)

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

    def of_rows(self, rows: slice) -> Grids:
        """Those of some output rows; views."""
        part = Grids.__new__(Grids)
        part.grid, part.group_size, part.scales = self.grid, self.group_size, self.scales[:, rows]
        part.zeros = None if self.zeros is None else self.zeros[:, rows]
        return part

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
    groups = torch.arange(len(columns)) // grids.group_size
    for start in range(0, columns.shape[1], _N_ROWS):
        rows = slice(start, start + _N_ROWS)
        part = grids.of_rows(rows)
        wanted, points = columns[:, rows].contiguous(), q[:, rows].contiguous()
        nearest_to = torch.empty_like(wanted)
        for _ in range(n_sweeps):
            _fit_scales(wanted, part.steps(points, groups), part, groups, inputs)
            _descend(wanted, points, nearest_to, part, groups, inputs)
        columns[:, rows], q[:, rows] = nearest_to, points


def _pull(error: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """(H + d) e of errors [in, rows]."""
    return torch.addmm(error, inputs.moments, error, beta=inputs.damping)


def _fit_scales(wanted: torch.Tensor, steps: torch.Tensor, grids: Grids, groups: torch.Tensor, inputs: Inputs) -> None:
    """With the steps [in, rows] of each group as one vector, the least squares solution for the scales of each row."""
    n_in, n_rows = wanted.shape
    n_groups = len(grids.scales)

    def sums(values: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Over the columns of each group from `first` on, [groups, rows]."""
        padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % grids.group_size))
        return padded.view(n_groups - first, grids.group_size, n_rows).sum(1)

    old = grids.scales.float()
    right = sums(_pull(wanted - steps * old[groups], inputs).mul_(steps))
    products = torch.empty((n_groups, n_groups, n_rows))
    for group in range(n_groups):
        start, stop = group * grids.group_size, min((group + 1) * grids.group_size, n_in)
        own = torch.mm(inputs.moments[start:, start:stop], steps[start:stop])
        own[: stop - start].add_(steps[start:stop], alpha=inputs.damping)
        products[group, group:] = sums(own.mul_(steps[start:]), group)
        products[group + 1 :, group] = products[group, group + 1 :]
    products = products.movedim(-1, 0)
    lacking = products.diagonal(dim1=1, dim2=2) <= 0  # a group of zeros: any scale will do
    products.diagonal(dim1=1, dim2=2)[lacking] = 1.0
    change, _ = torch.linalg.solve_ex(products, right.T)
    new = (old + change.T).to(grids.scales.dtype)
    new = torch.where((new.float() > 0) & torch.isfinite(new.float()), new, grids.scales)
    moved = (new.float() - old).T.unsqueeze(-1)
    gain = (moved.mT @ products @ moved).view(-1) - 2 * (moved.mT @ right.T.unsqueeze(-1)).view(-1)
    grids.scales.copy_(torch.where(gain < 0, new, grids.scales))


def _descend(
    wanted: torch.Tensor,
    q: torch.Tensor,
    nearest_to: torch.Tensor,
    grids: Grids,
    groups: torch.Tensor,
    inputs: Inputs,
) -> None:
    """Each column [rows] in turn; `nearest_to` [in, rows] is filled with what its points are nearest to."""
    restored = grids.steps(q, groups).mul_(grids.scales.float()[groups])
    pull = _pull(wanted - restored, inputs)
    curvature, of_column = (inputs.moments.diagonal() + inputs.damping).tolist(), groups.tolist()
    n_in = len(wanted)
    for start in range(0, n_in, _N_COLUMNS):
        stop = min(start + _N_COLUMNS, n_in)
        own, inner = pull[start:stop], inputs.moments[start:stop, start:stop]
        changes = torch.empty_like(own)
        for j in range(stop - start):
            column = start + j
            if curvature[column] > 0:
                torch.add(restored[column], own[j], alpha=1 / curvature[column], out=nearest_to[column])
            else:
                nearest_to[column] = wanted[column]
            q[column], number = grids.nearest(of_column[column], nearest_to[column])
            torch.sub(number, restored[column], out=changes[j])
            if column + 1 < stop:
                own[j + 1 :].addr_(inner[j + 1 :, j], changes[j], alpha=-1)
        if stop < n_in:
            pull[stop:].addmm_(inputs.moments[stop:, start:stop], changes, alpha=-1)
