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

from typing import TYPE_CHECKING, NamedTuple

from llmkit.quantization.codecs.gguf_points import Points

if TYPE_CHECKING:
    import torch

    from llmkit.quantization.codecs.gguf_grids import BlockGrid

__all__ = ["Blocks", "fitted"]

_N_CHUNK = 2**17  # weights at work: their tensors stay in the cache of a core
_LEAST_SHARE = 1e-4  # of the mean importance: a column that no token reached is rounded all the same
_N_ROUNDS = 2


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
        importance = importance.clamp(min=float(importance.mean()) * _LEAST_SHARE).view(per_row, grid.block)
    step = max(_N_CHUNK // weight.shape[-1], 1) * per_row  # whole rows, as importance is of a row
    parts = [_fitted(blocks[i : i + step], grid, importance) for i in range(0, len(blocks), step)]
    halves = tuple(torch.cat(found) for found in zip(*(part.halves for part in parts), strict=True))
    integers = [part.integers for part in parts if part.integers is not None]
    return Blocks(torch.cat([part.codes for part in parts]), halves, torch.cat(integers) if integers else None)


def _fitted(blocks: torch.Tensor, grid: BlockGrid, importance: torch.Tensor | None) -> Blocks:
    import torch

    squares = blocks.square()
    values = squares.add_(squares.mean(-1, keepdim=True)).sqrt_()
    if importance is not None:
        values = (values.view(-1, *importance.shape) * importance).view(blocks.shape)
    shape = (len(blocks), grid.block // grid.group, grid.group)
    fit = _Fit(*(part.view(shape).permute(2, 1, 0).contiguous() for part in (blocks, values)), grid)
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
        self._of_v, self._of_vx = v.sum(0), self._vx.sum(0)
        self._q, self._work = torch.empty_like(x), torch.empty_like(x)

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
            torch.addcmul(offset * inverse, self._x, inverse, out=self._q)
        return self._grid.points.nearest_(self._q)

    def _sums(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> _Sums:
        import torch

        q = self._nearest(scale, offset)
        qx = torch.mul(self._vx, q, out=self._work).sum(0)
        vq = torch.mul(self._v, q, out=self._work)
        of_q = vq.sum(0) if self._grid.e is not None else qx
        return _Sums(of_q, vq.mul_(q).sum(0), qx)

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
        n_steps = self._grid.points.highest
        least = torch.full_like(low, torch.inf)
        best, best_minimum, curvature = torch.zeros_like(low), low.clone(), torch.zeros_like(low)
        for more in _more_steps(n_steps):
            found = self._sums((high - low) / (n_steps + more), -low)
            scale, minimum = self._line(found, is_below_zero=is_below_zero)
            error = self._error(found, scale, -minimum)
            is_better = error < least
            for kept, new in ((least, error), (best, scale), (best_minimum, minimum), (curvature, found.qq)):
                torch.where(is_better, new, kept, out=kept)
        return best, best_minimum, curvature

    def _line(self, sums: _Sums, *, is_below_zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and minimum of each group with the least error for these points."""
        import torch

        determinant = self._of_v * sums.qq - sums.q.square()
        scale = (self._of_v * sums.qx - self._of_vx * sums.q) / determinant
        minimum = (sums.qq * self._of_vx - sums.q * sums.qx) / determinant
        if is_below_zero:
            scale = torch.where(minimum > 0, sums.qx / sums.qq, scale)
            minimum = minimum.clamp_(max=0)
        is_flat = ~(determinant > 0)
        scale.masked_fill_(is_flat, 0)
        mean = self._of_vx / self._of_v
        minimum = torch.where(is_flat, mean.clamp_(max=0) if is_below_zero else mean, minimum)
        return scale, minimum

    def _try_integers(self, steps: Points) -> None:
        """Step 3: the integers beside those of each group."""
        import torch

        s, t, d, e = self.s, self.t, self.d, self.e
        least = torch.full_like(s, torch.inf)
        best_s, best_t = s, t
        for more in (0, -1, 1):
            new = (s + more).clamp_(steps.lowest, steps.highest)
            scale = d * new
            found = self._sums(scale, e * t if self._grid.e is not None else None)
            candidates = [(found, t)]
            if self._grid.minimum_steps is not None:
                wanted = (scale * found.q - self._of_vx) / (self._of_v * e)
                other = wanted.nan_to_num_(0, 0, 0).round_().clamp_(0, self._grid.minimum_steps.highest)
                candidates.append((self._sums(scale, e * other), other))
            for sums, minimum in candidates:
                error = self._error(sums, scale, e * minimum)
                is_better = error < least
                least = torch.where(is_better, error, least)
                best_s, best_t = torch.where(is_better, new, best_s), torch.where(is_better, minimum, best_t)
        self.s, self.t = best_s, best_t

    def _refit(self) -> None:
        """Step 3: d and e again, where this lessens the error of the block."""
        import torch

        s, t = self.s, self.t
        scale, offset = self.d * s, self.e * t
        sums = self._sums(scale, offset)
        before = self._error(sums, scale, offset).sum(0)
        aa, ax = (s * s * sums.qq).sum(0), (s * sums.qx).sum(0)
        if self._grid.e is None:
            d, e = ax / aa, self.e
        else:
            ab, bb, bx = (s * t * sums.q).sum(0), (t * t * self._of_v).sum(0), (t * self._of_vx).sum(0)
            determinant = aa * bb - ab.square()
            d, e = (ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant
            e = torch.where(determinant > 0, e, self.e)
            d = torch.where(determinant > 0, d, (ax + e * ab) / aa)
        d, e = _half(d), _half(e)
        scale, offset = d * s, e * t
        after = self._error(self._sums(scale, offset), scale, offset).sum(0)
        is_better = after < before
        self.d, self.e = torch.where(is_better, d, self.d), torch.where(is_better, e, self.e)


def _more_steps(n: float) -> list[float]:
    """By how much the number of steps in a range is varied."""
    return [0.15 * i for i in range(-6, 7)]


def _best_scale(x, points, sums_of):  # type: ignore[no-untyped-def]
    import torch

    high, low = x.amax(0), x.amin(0)
    end = points.lowest if points.lowest < 0 else points.highest
    extreme = torch.where(high > -low, high, low) if points.lowest < 0 else high
    best, curvature, most = torch.zeros_like(high), torch.zeros_like(high), torch.zeros_like(high)
    unit = 1 if points.table is None else 8
    for more in _more_steps(end):
        qx, qq = sums_of((end + unit * more) / extreme)
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
        return (curvature * s * scale).sum(0), (curvature * s * s).sum(0)

    d, _ = _best_scale(scale, steps, sums)
    d = _half(d)
    return d, steps.nearest_((scale / d).nan_to_num_(0, 0, 0))


def _half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16; 0 for what is none."""
    return x.half().float().nan_to_num_(0)
