"""Round to nearest: the grid of each group from its extremes, every weight to the nearest grid point.

    symmetric     scale = absmax / ((2^bits - 1) / 2), or the largest of points that are no integers
    asymmetric    scale = (max - min) / (2^bits - 1),   zero = q_min - min / scale      (0 is always on the grid)
    q = round(clamp(w / scale + zero, q_min, q_max)),   w' = (q - zero) * scale

with q from q_min = -2^(bits-1); codes are q - q_min. These are compressed-tensors' `calculate_qparams` and `quantize`,
bit for bit, called on float32 weights with `scale_dtype` set to the dtype in which scales are stored. Called on
bfloat16 weights as they are, that library divides in bfloat16, whose 8 significant bits round the quotient before it is
rounded to the grid: at 8 bits the error is 5 to 9 % larger (Gaussian weights; at 4 bits, and in float16, under 0.3 %).
Here half-precision weights are widened, which is exact, and divided by the scale as it is stored, so the only rounding
is the one to the grid.

Source: compressed_tensors/quantization/utils/helpers.py and quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

import math

from llmkit.lazy_imports import torch
from llmkit.quantization.matrix import BLOCK_NBYTES, Grid
from llmkit.quantization.method import Method, QuantizedRows
from llmkit.quantization.packing import n_bytes, pack, pack_into, width
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.finite import require_finite


class RoundToNearest(Method):
    """Every row from itself alone.

    Args:
        is_narrow: a symmetric grid ends at -(2^(bits-1) - 1), and the scale is absmax / (2^(bits-1) - 1).
    """

    name = "rtn"
    words = "rounded to nearest"
    takes_points = True

    def __init__(self, is_narrow: bool = False) -> None:
        self._is_narrow = is_narrow

    def quantize(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None = None
    ) -> QuantizedRows:
        n_out, n_in = weight.shape
        n_groups = grid.n_groups(n_in)
        codes = torch.empty((n_out, n_bytes(n_in, grid.bits)), dtype=torch.uint8)
        scales = torch.empty((n_out, n_groups), dtype=scale_dtype)
        zeros = None if grid.is_symmetric else torch.empty((n_out, n_groups), dtype=torch.uint8)
        n_rows = min(max(BLOCK_NBYTES // (4 * max(n_in, 1)), 1), n_out)
        block = _Block(n_rows, n_in, grid, weight.dtype)
        error = norm = 0.0
        for start in range(0, n_out, n_rows):
            rows = slice(start, min(start + n_rows, n_out))
            block.load(weight[rows])
            scale, zero = self.scales(block.weight, grid, scale_dtype, statistics)
            block.round(scale, zero)
            scales[rows] = scale
            if zeros is not None and zero is not None:
                zeros[rows] = to_codes(zero, grid)
            errors = block.error(scale, zero)
            error, norm = error + errors[0], norm + errors[1]
            block.pack_into(codes[rows])
        return QuantizedRows(codes, scales, zeros, error, norm)

    def scales(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points of float32 weights [out, groups, size], as of `scales_and_zeros`."""
        return scales_and_zeros(weight, grid, scale_dtype, is_narrow=self._is_narrow)


def scales_and_zeros(
    weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, *, is_narrow: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale of each group of float32 weights [out, groups, size], and its zero point.

    Returns:
        Scales in `scale_dtype`, never 0; zero points as q (int8) or None for a symmetric grid; both [out, groups].

    Raises:
        InputError: a group holds NaN or an infinity, or reaches beyond the dtype of its scale.
    """
    q_min, n_steps = -grid.middle, 2 * grid.middle - 1
    low = weight.amin(-1).clamp_(max=0)
    high = weight.amax(-1).clamp_(min=0)
    require_finite(weight, high - low)
    if grid.is_symmetric:
        scale, zero = torch.maximum(-low, high) / (grid.middle - 1 if is_narrow else grid.half_range), None
    else:
        scale = (high - low) / n_steps
        if grid.lowest_zero:  # of a group above zero, fewer codes are left
            scale = scale.maximum(high / (n_steps - grid.lowest_zero))
        # A group of zeros gives 0/0; any zero point represents it, 0 is the plain choice.
        exact = (q_min - low / scale).nan_to_num_(nan=0.0)
        zero = exact.clamp_(q_min + grid.lowest_zero, q_min + n_steps).round_().to(torch.int8)
    info = torch.finfo(scale_dtype)
    stored = scale.to(scale_dtype)
    require_finite(weight, stored * (n_steps if zero is not None else math.ceil(grid.half_range)))
    # All-zero groups, and scales too small for the stored dtype: any positive scale then rounds the group to zero.
    stored = stored.masked_fill_(stored == 0, info.eps)
    return stored, zero


class _Block:
    """Rows at work: memory that is used again for every block (fresh pages would cost as much as the arithmetic)."""

    def __init__(self, n_rows: int, n_in: int, grid: Grid, dtype: torch.dtype) -> None:
        n_groups, group = grid.n_groups(n_in), grid.group_size or n_in
        shape = (n_rows, n_groups, group)
        self._grid, self._n_in, self._missing = grid, n_in, n_groups * group - n_in
        self._wide = None if dtype is torch.float32 and not self._missing else torch.zeros(shape)
        self._steps = torch.empty(shape)
        self._q = torch.empty(shape, dtype=torch.int8)

    def load(self, rows: torch.Tensor) -> None:
        """Take rows [rows, in] as float32. What the last group lacks is zero, which lies on every grid."""
        n = len(rows)
        if self._wide is None:
            self.weight = rows.reshape(n, *self._steps.shape[1:])
        else:
            self._wide[:n].flatten(1)[:, : self._n_in].copy_(rows)
            self.weight = self._wide[:n]
        self.steps, self.q = self._steps[:n], self._q[:n]

    def round(self, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        """Find the grid points `q`, int8 [rows, groups, size], nearest to the weights.

        Args:
            scale: of each group, [rows, groups].
            zero: its zero point as a grid point, [rows, groups]; None for a grid without.
        """
        middle, points = self._grid.middle, self._grid.points
        torch.div(self.weight, scale.float().unsqueeze(-1), out=self.steps)
        if points is not None:
            codes = points.codes(self.steps)
            self.steps.copy_(points.numbers(codes))
            self.q.copy_(to_points(codes, self._grid))
            return
        if zero is not None:
            self.steps.add_(zero.unsqueeze(-1))
        self.q.copy_(self.steps.clamp_(-middle, middle - 1).round_())

    def error(self, scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[float, float]:
        """Squared error of the weights as they will be read, and their squared norm; arguments as of `round`."""
        if zero is not None:
            self.steps.sub_(zero.unsqueeze(-1))
        restored = self.steps.mul_(scale.float().unsqueeze(-1))
        if scale.dtype is not torch.float32:
            restored = restored.to(scale.dtype).float()
        error, weight = restored.sub_(self.weight).view(-1), self.weight.reshape(-1)
        return float(torch.dot(error, error)), float(torch.dot(weight, weight))

    def pack_into(self, codes: torch.Tensor) -> None:
        """Write the codes of the weights into uint8 [rows, bytes]; `q` is scratch afterwards."""
        if self._missing or codes.shape[1] * 8 != self._n_in * width(self._grid.bits):
            codes.copy_(pack(to_codes(self.q.flatten(1)[:, : self._n_in], self._grid), self._grid.bits))
        else:
            pack_into(codes, self.q, self._grid.bits)


def to_codes(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Grid points, int8 of any shape, as codes, uint8."""
    return (q.contiguous().view(torch.uint8) + grid.middle) & (2 * grid.middle - 1)


def to_points(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes, uint8 of any shape, as the grid points (int8) that `to_codes` takes."""
    return (codes - grid.middle).view(torch.int8)


def quantized_rows(
    weight: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    grid: Grid,
    order: torch.Tensor | None = None,
    note: str = "",
    corrected: torch.Tensor | None = None,
) -> QuantizedRows:
    """The rows of a weight [out, in] that points on the grid stand for.

    Args:
        q: the points, int8 [out, in].
        scales, zeros: [out, groups]; zeros as points, int8.
        order, note, corrected: of `QuantizedRows`.
    """
    n_in = weight.shape[1]
    group = order.long() if order is not None else torch.arange(n_in) // (grid.group_size or n_in)
    offset = 0 if zeros is None else zeros.float()[:, group]
    original = weight.float()
    codes = to_codes(q, grid)
    numbers = q.float() - offset if grid.points is None else grid.points.numbers(codes)
    error = numbers.mul_(scales.float()[:, group]).sub_(original)
    return QuantizedRows(
        pack(codes, grid.bits),
        scales,
        None if zeros is None else to_codes(zeros, grid),
        float(error.square_().sum()),
        float(original.square().sum()),
        order,
        note,
        corrected,
    )


METHOD, NARROW = RoundToNearest(), RoundToNearest(is_narrow=True)
