"""Blocks of GGUF files made of floats: scales, minima and codes with the least weighted squared error.

A block has float16 numbers d (and e), and those of 256 weights small integers s (and t) for each of their groups:

    w' = d s q,     w' = d s q - e t,     in blocks of 32 weights     w' = d q,     w' = d q + e

The error is

    sum over weights of v (w - w')^2,      v = E[x^2] sqrt(mean(w^2) + w^2)

with E[x^2] of the input channel, 1 where nothing was measured, and the mean over the block. Three steps, each for all
groups of some rows at once:

1. every group by itself: its range is divided into a few more or fewer steps; for the codes of each the best scale (and
   minimum) follows by least squares, and the best of them is kept;
2. d (e): likewise, so that d s is nearest to the scales of step 1;
3. twice: the integers next to s (t) are tried on the weights themselves, then d (and e) fitted to all groups again.

Tensors are [weights of a group, groups, blocks], so that sums run over the first axis. Source of the weights v and of
steps 1 and 2: `make_qkx3_quants`, `make_qx_quants` and `make_qp_quants` in ggml-quants.c of ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from llmkit.quantization.codecs.gguf_points import Points

if TYPE_CHECKING:
    import torch

    from llmkit.quantization.codecs.gguf_grids import BlockGrid

__all__ = ["Blocks", "fitted"]

_N_CHUNK = 2**17  # weights at work: few enough that a core has them near, many enough to be worth the calls
_LEAST_SHARE = 1e-4  # of the mean importance: a column that no token reached is rounded all the same
_N_ROUNDS = 2
_ROUNDING = 1e-5  # what is left of a determinant that should be 0


class Blocks(NamedTuple):
    """Blocks in numbers, as `BlockGrid.pack` takes them.

    Attributes:
        codes: uint8 [blocks, weights].
        halves: d, and e where the type has minima; float16 [blocks] each.
        integers: uint8 [blocks, n]; None for types without.
    """

    codes: torch.Tensor
    halves: tuple[torch.Tensor, ...]
    integers: torch.Tensor | None


def fitted(weight: torch.Tensor, grid: BlockGrid, importance: torch.Tensor | None = None) -> Blocks:
    """The blocks of float32 weights [rows, in], one after the other.

    Args:
        importance: the mean of x^2 of each input channel, float32 [in]; None: all count the same.
    """
    import torch

    per_row = weight.shape[-1] // grid.block
    blocks = weight.reshape(-1, grid.block)
    if importance is not None:
        mean = float(importance.mean())
        importance = (importance / mean).clamp_(min=_LEAST_SHARE).view(per_row, grid.block)
    step = max(_N_CHUNK // weight.shape[-1], 1) * per_row  # whole rows, as importance is of a row
    parts = [_fitted(blocks[i : i + step], grid, importance) for i in range(0, len(blocks), step)]
    halves = tuple(torch.cat(found) for found in zip(*(part.halves for part in parts), strict=True))
    integers = [part.integers for part in parts if part.integers is not None]
    return Blocks(torch.cat([part.codes for part in parts]), halves, torch.cat(integers) if integers else None)


def _fitted(blocks: torch.Tensor, grid: BlockGrid, importance: torch.Tensor | None) -> Blocks:
    import torch

    x = blocks.view(len(blocks), grid.block // grid.group, grid.group).permute(2, 1, 0).contiguous()
    squares = x.square()
    mean = _sum(_sum(squares)) / grid.block
    v = squares.div_(mean.clamp(min=torch.finfo(torch.float32).tiny)).add_(1).sqrt_()  # but for a factor of the block
    if importance is not None:
        of_row = importance.view(len(importance), grid.block // grid.group, grid.group).permute(2, 1, 0)
        v = (v.view(*v.shape[:2], -1, len(importance)) * of_row.unsqueeze(2)).view(v.shape)
    fit = _Fit(x, v, grid)
    fit.solve()
    codes = grid.points.codes(fit.points()).permute(2, 1, 0).reshape(blocks.shape)
    halves = (fit.d.half(), fit.e.half()) if grid.e is not None else (fit.d.half(),)
    integers = None
    if grid.integers is not None:
        numbers = [fit.s + grid.centre, fit.t] if grid.e is not None else [fit.s + grid.centre]
        integers = torch.cat(numbers).T.to(torch.uint8)
    return Blocks(codes, halves, integers)


class _Sums(NamedTuple):
    """Sums over each group, weighted by v: of its points q, q^2 and q x."""

    q: torch.Tensor
    qq: torch.Tensor
    qx: torch.Tensor


class _Fit:
    """Numbers of the blocks: d, e [blocks]; s, t [groups, blocks], 1 (and -1) where the type has no integers.

    A weight is `d s q - e t`.

    Args:
        x, v: weights and what they count, float32 [weights, groups, blocks].
    """

    def __init__(self, x: torch.Tensor, v: torch.Tensor, grid: BlockGrid) -> None:
        import torch

        self._x, self._v, self._vx, self._grid = x, v, v * x, grid
        self._of_v, self._of_vx = _sum(v), _sum(self._vx)
        self._q, self._products = torch.empty_like(x), x.new_empty((2 if grid.e is None else 3, *x.shape))

    def solve(self) -> None:
        """All three steps."""
        import torch

        scale, minimum, curvature = self._minima() if self._grid.e is not None else self._scales()
        self.d, self.s = _shared(scale, curvature, self._grid.scale_steps)
        if self._grid.e is None:
            self.e, self.t = torch.zeros_like(self.d), torch.zeros_like(self.s)
        elif self._grid.minimum_steps is None:
            self.e, self.t = _half(minimum[0]), torch.full_like(self.s, -1)
        else:
            self.e, self.t = _shared(-minimum, self._of_v, self._grid.minimum_steps)
        if not bool(torch.isfinite(self.d + self.e).all()):
            return  # refused by whoever asked, who knows the name
        self._now = self._sums(self.d * self.s, self.e * self.t)
        self._error_now = self._error(self._now, self.d * self.s, self.e * self.t)
        for _ in range(_N_ROUNDS):
            if self._grid.scale_steps is not None:
                self._try_integers(self._grid.scale_steps)
            self._refit()

    def points(self) -> torch.Tensor:
        """The points that the weights are rounded to, [weights, groups, blocks]."""
        return self._nearest(self.d * self.s, self.e * self.t)

    def _nearest(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest points to (x + offset) / scale, 0 for a scale of 0; scale, offset are [groups, blocks]."""
        import torch

        inverse = scale.reciprocal().nan_to_num_(0, 0, 0)
        if offset is None:
            torch.mul(self._x, inverse, out=self._q)
        else:
            torch.add(self._x, offset, out=self._q).mul_(inverse)
        return self._grid.points.nearest_(self._q)

    def _sums(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> _Sums:
        import torch

        q, found = self._nearest(scale, offset), self._products
        torch.mul(self._vx, q, out=found[0])
        torch.mul(self._v, q, out=found[1])
        if self._grid.e is not None:
            torch.mul(found[1], q, out=found[2])
            qx, of_q, qq = _fold_(found, 1).unbind()
        else:
            found[1].mul_(q)
            qx, qq = _fold_(found, 1).unbind()
            of_q = qx  # nobody asks
        return _Sums(of_q.clone(), qq.clone(), qx.clone())

    def _error(self, sums: _Sums, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The error of each group, less a constant."""
        error = scale * (scale * sums.qq - 2 * sums.qx)
        if self._grid.e is None:
            return error
        return error + offset * (offset * self._of_v + 2 * (self._of_vx - scale * sums.q))

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step 1 without minima: the scale of each group, zeros, and how much the error grows with its square."""
        import torch

        def sums(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self._sums(inverse.reciprocal())
            return found.qx, found.qq

        scale, curvature = _best_scale(self._x, self._grid.points, sums)
        return scale, torch.zeros_like(scale), curvature

    def _minima(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step 1 with minima."""
        import torch

        low, high = self._x.amin(0), self._x.amax(0)
        is_below_zero = self._grid.minimum_steps is not None  # - e t cannot be positive
        if is_below_zero:
            low = low.clamp_(max=0)
        least = torch.full_like(low, torch.inf)
        best, best_minimum, curvature = torch.zeros_like(low), low.clone(), torch.zeros_like(low)
        for n_steps in self._grid.points.ends_tried:
            found = self._sums((high - low) / n_steps, -low)
            scale, minimum = self._line(found, is_below_zero=is_below_zero)
            error = self._error(found, scale, -minimum)
            is_better = error < least
            for kept, new in ((least, error), (best, scale), (best_minimum, minimum), (curvature, found.qq)):
                torch.where(is_better, new, kept, out=kept)
        return best, best_minimum, curvature

    def _line(self, sums: _Sums, *, is_below_zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and minimum of each group with the least error for these points."""
        import torch

        whole = self._of_v * sums.qq
        determinant = whole - sums.q.square()
        is_one_point = determinant <= _ROUNDING * whole  # all on the same point: a scale alone, or a minimum alone
        scale = (self._of_v * sums.qx - self._of_vx * sums.q) / determinant
        minimum = (sums.qq * self._of_vx - sums.q * sums.qx) / determinant
        if is_below_zero:
            is_one_point |= minimum > 0
            return torch.where(is_one_point, sums.qx / sums.qq, scale), minimum.masked_fill_(is_one_point, 0)
        return scale.masked_fill_(is_one_point, 0), torch.where(is_one_point, self._of_vx / self._of_v, minimum)

    def _try_integers(self, steps: Points) -> None:
        """Step 3: the integers beside those of each group."""
        s, t, now = self.s, self.t, self._now
        minima = self._grid.minimum_steps
        for more in (0, -1, 1) if minima is not None else (-1, 1):
            new = (s + more).clamp_(steps.lowest, steps.highest)
            if minima is not None:  # the best offset where points stay the same
                wanted = (self.d * new * now.q - self._of_vx) / (self._of_v * self.e)
                t = wanted.nan_to_num_(0, 0, 0).round_().clamp_(0, minima.highest)
            scale, offset = self.d * new, self.e * t
            sums = self._sums(scale, offset)
            self._take_better(sums, self._error(sums, scale, offset), s=new, t=t)

    def _take_better(self, sums: _Sums, error: torch.Tensor, **numbers: torch.Tensor) -> None:
        """Change numbers where the error of the group is less than now."""
        import torch

        is_better = error < self._error_now
        self._error_now = torch.where(is_better, error, self._error_now)
        self._now = _Sums(*(torch.where(is_better, new, old) for new, old in zip(sums, self._now, strict=True)))
        for name, new in numbers.items():
            setattr(self, name, torch.where(is_better, new, getattr(self, name)))

    def _refit(self) -> None:
        """Step 3: d and e again, where this lessens the error of the block."""
        import torch

        s, t, sums = self.s, self.t, self._now
        aa, ax = _sum(s * s * sums.qq), _sum(s * sums.qx)
        if self._grid.e is None:
            d, e = ax / aa, self.e
        else:
            ab, bb, bx = _sum(s * t * sums.q), _sum(t * t * self._of_v), _sum(t * self._of_vx)
            determinant = aa * bb - ab.square()
            is_line = determinant > _ROUNDING * aa * bb
            e = torch.where(is_line, (ax * ab - bx * aa) / determinant, self.e)
            d = torch.where(is_line, (ax * bb - bx * ab) / determinant, (ax + e * ab) / aa)
        d, e = _half(d), _half(e)
        scale, offset = d * s, e * t
        found = self._sums(scale, offset)
        error = self._error(found, scale, offset)
        is_better = _sum(error) < _sum(self._error_now)
        self.d, self.e = torch.where(is_better, d, self.d), torch.where(is_better, e, self.e)
        self._error_now = torch.where(is_better, error, self._error_now)
        self._now = _Sums(*(torch.where(is_better, new, old) for new, old in zip(found, sums, strict=True)))


def _best_scale(
    x: torch.Tensor, points: Points, sums_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of points nearest to x [n, ...], and the sum of q^2 there; both [...].

    Args:
        sums_of: the sums of q x and q^2 over the first axis, for the points q nearest to x times its argument.
    """
    import torch

    high, low = x.amax(0), x.amin(0)
    is_signed = points.lowest < 0
    extreme = torch.where(high > -low, high, low) if is_signed else high
    best, curvature, most = torch.zeros_like(high), torch.zeros_like(high), torch.zeros_like(high)
    for end in points.ends_tried:
        qx, qq = sums_of(end / extreme)
        gain = (qx.square() / qq).nan_to_num_(0, 0, 0)
        is_better = gain > most
        for kept, new in ((most, gain), (best, qx / qq), (curvature, qq)):
            torch.where(is_better, new, kept, out=kept)
    return best, curvature


def _shared(scale: torch.Tensor, curvature: torch.Tensor, steps: Points | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2: d [blocks] and s [groups, blocks] with d s near to scales [groups, blocks].

    Args:
        curvature: how much the squared distance of each counts.
        steps: the values of s; None: the scale is d itself.
    """
    import torch

    if steps is None:
        return _half(scale[0]), torch.ones_like(scale)

    def sums(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = steps.nearest_((scale * inverse).nan_to_num_(0, 0, 0))
        return _sum(curvature * s * scale), _sum(curvature * s * s)

    d, _ = _best_scale(scale, steps, sums)
    d = _half(d)
    return d, steps.nearest_((scale / d).nan_to_num_(0, 0, 0))


def _half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16; 0 for 0 / 0."""
    import torch

    return x.half().float().nan_to_num_(0, torch.inf, -torch.inf)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, whose length is a power of two."""
    if len(x) == 1:
        return x[0]
    half = len(x) // 2
    return _fold_(x[:half] + x[half:], 0)


def _fold_(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The sum over an axis, whose length is a power of two; x is scratch afterwards.

    Halves are added to each other, so that the bits of a sum depend on what is summed alone: `torch.sum` takes another
    order in some of the columns, and which ones depends on how many rows are worked on at once.
    """
    n = x.shape[axis]
    while n > 1:
        n //= 2
        x.narrow(axis, 0, n).add_(x.narrow(axis, n, n))
    return x.select(axis, 0)
