"""SignRound: which way each weight is rounded, and how wide each grid is, is learnt from the output of the block.

With scale s and zero point z of its group a weight w becomes

    w' = s * clip(round(w / s + v), -z, n - z),   v in [-1/2, 1/2],   n = 2^bits - 1

and the ends of the group's range are multiplied by factors in [1/2, 3/2] (one factor, where the grid is symmetric).
All v and factors of a block move against the sign of the gradient of the squared error of the block's output, rounding
taken as the identity, by a step that falls linearly to zero. What is kept is the iterate with the least error, each
compared with what its samples had at the start (errors of other samples differ more than those of other iterates); or
the last one, or the start, where that has less error over all samples.

It starts from the grid with the least weighted error, not from that of the range. Or it starts where GPTQ ends: w is
then each column as GPTQ rounds it, corrected for what the columns before it lost, and all grids are those of GPTQ.

Source: Cheng et al. 2023, arXiv:2309.05516; intel/auto-round.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self

from llmkit.lazy_imports import torch
from llmkit.quantization.codec import error_context
from llmkit.quantization.matrix import BLOCK_NBYTES, Grid
from llmkit.quantization.method import BlockError, BlockMethod, BlockWeight, QuantizedRows
from llmkit.quantization.methods.gptq import GPTQ
from llmkit.quantization.methods.mse import LeastSquares
from llmkit.quantization.methods.rtn import quantized_rows, to_codes
from llmkit.quantization.search import importance_of, searched_scales
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.finite import require_finite

_ITERATIONS, _ITERATIONS_OF_FEW_BITS = 200, 1000  # the paper's: with 3 bits and fewer more of them, at twice the rate
_FEW_BITS = 3
_BATCH = 4  # samples in an iteration
_LEAST_FACTOR, _MOST_FACTOR = 0.5, 1.5
_REPORT_EVERY = 10


class SignRound(BlockMethod, LeastSquares):
    """A block at a time; every weight begins where the search for the least squared error ends."""

    name = "signround"
    takes_points = False
    words = "by SignRound from the grid with the least weighted error"
    needs = frozenset({"squares"})
    uses = frozenset()
    is_row_wise = False

    def __init__(self) -> None:
        super().__init__()
        self._iterations: int | None = None

    def configured(self, *, iterations: int | None = None, act_order: bool | None = None) -> Self:
        made = copy.copy(super().configured(act_order=act_order))
        made._iterations = iterations
        return made

    def attrs(self) -> dict[str, Any]:
        return {**super().attrs(), **({} if self._iterations is None else {"iterations": self._iterations})}

    def _n_iterations(self, bits: int) -> int:
        if self._iterations is not None:
            return self._iterations
        return _ITERATIONS_OF_FEW_BITS if bits <= _FEW_BITS else _ITERATIONS

    def n_passes(self, n_samples: int, grid: Grid) -> float:
        return 3 * (n_samples + min(_BATCH, n_samples) * self._n_iterations(grid.bits))

    def quantize_block(self, weights: Mapping[str, BlockWeight], error: BlockError) -> dict[str, QuantizedRows]:
        learned = dict[str, _Learned]()
        for name, given in weights.items():
            with error_context(name):
                learned[name] = _Learned(given)
        bits = min(each.grid.bits for each in weights.values())
        n_iterations, n_samples = self._n_iterations(bits), min(_BATCH, error.n_samples)
        first_rate = (2 if bits <= _FEW_BITS else 1) / max(n_iterations, 1)
        restored = {name: each.restored() for name, each in learned.items()}
        start, least = _errors(error, restored), 1.0
        error.report(0.0, "error ×1.00")
        for i in range(n_iterations):
            samples = error.draw(n_samples)
            value, gradients = error.gradient(restored, samples)
            ratio = value * n_samples / max(sum(start[k] for k in samples), 1e-30)
            if i and ratio < least:
                least = ratio
                for each in learned.values():
                    each.keep()
            for name, each in learned.items():
                each.step(gradients[name], first_rate * (1 - i / n_iterations))
            restored = {name: each.restored() for name, each in learned.items()}
            if (i + 1) % _REPORT_EVERY == 0:
                error.report((i + 1) / n_iterations, f"error ×{least:.2f}")
        kept = sum(_errors(error, {name: each.restored_best() for name, each in learned.items()}))
        last = sum(_errors(error, restored))
        for each in learned.values():
            if min(kept, last) >= sum(start):
                each.keep_first()
            elif last < kept:
                each.keep()
        return {name: each.rows() for name, each in learned.items()}


def _errors(error: BlockError, weights: Mapping[str, torch.Tensor]) -> list[float]:
    """Of all samples."""
    batches = (range(i, min(i + _BATCH, error.n_samples)) for i in range(0, error.n_samples, _BATCH))
    return [value for batch in batches for value in error.value(weights, batch)]


class _Learned:
    """What is learnt for one weight: v [out, groups, size] and the factors of ends [out, groups], float32."""

    def __init__(self, given: BlockWeight) -> None:
        self._original, self._grid, self._scale_dtype = given.weight, given.grid, given.scale_dtype
        n_out, n_in = given.weight.shape
        n_groups, size = given.grid.n_groups(n_in), given.grid.group_size or n_in
        wide = given.weight.float()
        require_finite(wide, wide)
        if given.start is not None and given.start.corrected is not None:
            wide = given.start.corrected
        self._weight = torch.nn.functional.pad(wide, (0, n_groups * size - n_in)).view(n_out, n_groups, size)
        if given.start is None:
            importance = importance_of(given.statistics, self._weight.shape[1:])
            scales, zeros = searched_scales(self._weight, given.grid, given.scale_dtype, importance)
            codes = None if zeros is None else to_codes(zeros, given.grid)
        else:
            scales, codes = given.start.scales, given.start.zeros
        self._n_steps = 2 * given.grid.middle - 1
        self._scale = scales  # of this iterate; zero as a code
        self._zero = torch.full(scales.shape, float(given.grid.middle)) if codes is None else codes.float()
        self._low, self._high = -self._zero * scales.float(), (self._n_steps - self._zero) * scales.float()
        self._rest = torch.zeros_like(self._zero)
        self._factors = torch.ones((2, n_out, n_groups))
        self._v = torch.zeros_like(self._weight)
        self.keep()
        self._first = self._best

    def _blocks(self) -> Iterator[slice]:
        """Rows that stay in the second-level cache while they are worked on."""
        n_out, n_groups, size = self._weight.shape
        step = max(BLOCK_NBYTES // (4 * n_groups * size), 1)
        return (slice(start, start + step) for start in range(0, n_out, step))

    def _points(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights in steps [rows, groups, size], the points beside zero that they are rounded to, those unclipped."""
        zero = self._zero[rows].unsqueeze(-1)
        steps = self._weight[rows] / self._scale[rows].float().unsqueeze(-1)
        unclipped = (steps + self._v[rows]).round_()
        return steps, torch.clamp(unclipped, -zero, self._n_steps - zero), unclipped

    def restored(self) -> torch.Tensor:
        """The weight [out, in] of this iterate, float32."""
        made = torch.empty_like(self._weight)
        for rows in self._blocks():
            made[rows] = self._points(rows)[1].mul_(self._scale[rows].float().unsqueeze(-1))
        return made.flatten(1)[:, : self._original.shape[1]]

    def keep(self) -> None:
        """Remember this iterate as the best one."""
        q = torch.empty(self._weight.shape, dtype=torch.int8)
        for rows in self._blocks():
            offset = self._zero[rows].unsqueeze(-1) - self._grid.middle
            q[rows] = self._points(rows)[1].add_(offset)
        self._best = q, self._scale.clone(), (self._zero - self._grid.middle).to(torch.int8)

    def keep_first(self) -> None:
        """Let the start be the best one."""
        self._best = self._first

    def restored_best(self) -> torch.Tensor:
        """The weight [out, in] of the best iterate, float32."""
        q, scales, zeros = self._best
        made = (q.float() - zeros.float().unsqueeze(-1)).mul_(scales.float().unsqueeze(-1))
        return made.flatten(1)[:, : self._original.shape[1]]

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """Move against the sign of the gradient of the error by `restored` [out, in]."""
        missing = self._weight[0].numel() - gradient.shape[1]
        whole = torch.nn.functional.pad(gradient, (0, missing)).view_as(self._weight)
        by_low, by_high = torch.empty_like(self._low), torch.empty_like(self._high)
        for rows in self._blocks():
            g = whole[rows]
            steps, points, unclipped = self._points(rows)
            is_inside = points == unclipped
            # Inside, w' is points * scale, and the scale a share of the range; a clipped weight is an end of it, but
            # for what the zero point was rounded by.
            moves = torch.where(is_inside, points - steps, self._rest[rows].unsqueeze(-1))
            by_scale = (g * moves).sum(-1) / self._n_steps
            by_low[rows] = (g * (unclipped < points)).sum(-1) - by_scale
            by_high[rows] = (g * (unclipped > points)).sum(-1) + by_scale
            self._v[rows].sub_(torch.sign(g).mul_(is_inside), alpha=rate).clamp_(-0.5, 0.5)
        ends = torch.stack([by_low * self._low, by_high * self._high])
        if self._grid.is_symmetric:
            ends = ends.sum(0, keepdim=True)
        self._factors.sub_(torch.sign(ends), alpha=rate).clamp_(_LEAST_FACTOR, _MOST_FACTOR)
        low, high = self._factors[0] * self._low, self._factors[1] * self._high
        tiny = torch.finfo(self._scale_dtype).tiny
        self._scale = ((high - low) / self._n_steps).to(self._scale_dtype).clamp_(min=tiny)
        if not self._grid.is_symmetric:
            exact = -low / self._scale.float()
            self._zero = exact.round().clamp_(self._grid.lowest_zero, self._n_steps)
            self._rest = exact - self._zero

    def rows(self) -> QuantizedRows:
        """The best iterate."""
        q, scales, zeros = self._best
        n_in = self._original.shape[1]
        in_place = q.flatten(1)[:, :n_in]
        return quantized_rows(self._original, in_place, scales, None if self._grid.is_symmetric else zeros, self._grid)


class SignRoundFromGPTQ(SignRound):
    """A block at a time; every weight begins where GPTQ ends."""

    name = "gptq-signround"
    words = "by SignRound from where GPTQ on the grid with the least weighted error ends"
    needs, uses = GPTQ.needs, GPTQ.uses
    starts_in_order = True
    _first = GPTQ(gives_corrected=True)

    def quantize(
        self, weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, statistics: Statistics | None = None
    ) -> QuantizedRows:
        return self._first.quantize(weight, grid, scale_dtype, statistics)


METHOD, FROM_GPTQ = SignRound(), SignRoundFromGPTQ()
