"""Blocks of GGUF files made of floats: scales, minima and codes with the least weighted squared error.

A block has float16 numbers d (and e), and those of 256 weights small integers s (and t) for each of their groups:

    w' = d s q,     w' = d s q - e t,     in blocks of 32 weights     w' = d q,     w' = d q + e

The error is

    sum over weights of v (w - w')^2

with v = E[x^2] of the input channel, and where nothing was measured v = sqrt(1 + w^2 / mean(w^2)), the mean over the
block. (llama.cpp multiplies the two: SmolLM2 in Q4_0 diverged by 0.176 so, by 0.165 without, in Q2_K by 0.274, 0.268.)
Three steps, each for all groups of some rows at once:

1. every group by itself: its range is divided into a few more or fewer steps; for the codes of each the best scale (and
   minimum) follows by least squares, and the best of them is kept;
2. d (e): likewise, so that d s is nearest to the scales of step 1;
3. once or twice: the integers next to s (t) are tried on the weights themselves, then d (and e) fitted to all groups
   again.

Tensors are [weights of a group, groups, blocks], so that sums run over the first axis. Source of v and of
steps 1 and 2: `make_qkx3_quants`, `make_qx_quants` and `make_qp_quants` in ggml-quants.c of ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from llmkit.lazy_imports import torch
from llmkit.quantization.codecs.gguf_grids import BlockGrid
from llmkit.quantization.codecs.gguf_points import Points

_N_TRIED = 2**17  # scales at work: few enough that a core has them near, many enough to be worth the calls
_LEAST_SHARE = 1e-4  # of the mean importance: a column that no token reached is rounded all the same
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


def search_blocks(weight: torch.Tensor, grid: BlockGrid, importance: torch.Tensor | None = None) -> Iterator[Blocks]:
    """The blocks of float32 weights [rows, in], one after the other, some at a time.

    Args:
        importance: the mean of x^2 of each input channel, float32 [in]; None: all count the same.
    """
    per_row = max(len(grid.points.ends_tried), 3) * weight.shape[-1] // grid.group  # scales tried
    n_rows = max(_N_TRIED // per_row, 1)  # whole ones, as importance is of a row
    v = _of_rows(importance, min(n_rows, len(weight)), grid) if importance is not None else None
    work = torch.empty(4 * n_rows * per_row)  # used again: fresh pages cost as much as the arithmetic
    for rows in weight.split(n_rows):
        x = _by_weight(rows, grid)
        fit = _Fit(x, _of_sizes(x) if v is None else v[..., : x.shape[-1]], grid, work)
        fit.solve(1 if v is None or grid.e is None else 2)  # the second gains 0.1 % without minima, 0.5 % with
        yield fit.blocks()


def _by_weight(rows: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Rows [rows, in] as [weights, groups, blocks]. Two copies are faster than one across three dimensions."""
    columns = rows.reshape(-1, grid.block).T.contiguous()
    return columns.view(grid.block // grid.group, grid.group, -1).transpose(0, 1).contiguous()


def _of_rows(importance: torch.Tensor, n_rows: int, grid: BlockGrid) -> torch.Tensor | None:
    """What the weights of rows count, [weights, groups, blocks]; None where no input was ever other than 0."""
    mean = float(importance.mean())
    if not mean:
        return None
    return _by_weight((importance / mean).clamp_(min=_LEAST_SHARE).expand(n_rows, -1), grid)


def _of_sizes(x: torch.Tensor) -> torch.Tensor:
    """What weights [weights, groups, blocks] count where nothing was measured."""
    squares = x.square()
    mean = _sum(_sum(squares)) / (x.shape[0] * x.shape[1])
    return squares.div_(mean.clamp_(min=torch.finfo(torch.float32).tiny)).add_(1).sqrt_()


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
        work: memory for four numbers of each candidate of each group, float32.
    """

    def __init__(self, x: torch.Tensor, v: torch.Tensor, grid: BlockGrid, work: torch.Tensor) -> None:
        self._x, self._v, self._grid, self._work = x, v, grid, work
        self._vx = v * x
        self._of_v, self._of_vx = _sum(v), _sum(self._vx)

    def solve(self, n_rounds: int) -> None:
        """All three steps, the last so often."""
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
        self._now = _Sums(*(part.clone() for part in self._sums(_inverse(self.d * self.s), self.e * self.t)))
        for _ in range(n_rounds):
            if self._grid.scale_steps is not None:
                self._try_integers(self._grid.scale_steps)
            self._refit()

    def blocks(self) -> Blocks:
        """The blocks, with the points nearest to the weights."""
        points = self._points(self._x, _inverse(self.d * self.s), self.e * self.t)
        codes = self._grid.points.codes(points).transpose(0, 1).reshape(self._grid.block, -1).T
        if self._grid.integers is None:
            integers = None
        else:
            numbers = [self.s + self._grid.centre, self.t] if self._grid.e is not None else [self.s + self._grid.centre]
            integers = torch.cat(numbers).to(torch.uint8).T
        halves = (self.d, self.e) if self._grid.e is not None else (self.d,)
        return Blocks(codes, tuple(half.half() for half in halves), integers)

    def _points(
        self, x: torch.Tensor, inverse: torch.Tensor, offset: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The nearest points to (x + offset) * inverse, all [..., groups, blocks]."""
        if self._grid.e is not None:
            x = x + offset
        return self._grid.points.nearest_(torch.mul(x, inverse, out=out))

    def _sums(self, inverse: torch.Tensor, offset: torch.Tensor) -> _Sums:
        """Of the points next to (x + offset) * inverse, all [..., groups, blocks]; valid until they are asked again."""
        q, of_q, of_qq, of_qx = self._work[: 4 * inverse.numel()].view(4, *inverse.shape)
        for total in (of_q, of_qq, of_qx):
            total.zero_()
        for x, v, vx in zip(self._x, self._v, self._vx, strict=True):  # all of this lies in a cache
            self._points(x, inverse, offset, out=q)
            of_qx.addcmul_(q, vx)
            if self._grid.e is not None:
                of_q.addcmul_(q, v)
            of_qq.addcmul_(q.mul_(q), v)
        return _Sums(of_q, of_qq, of_qx)

    def _error(self, sums: _Sums, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The error of each group, less a constant."""
        error = scale * (scale * sums.qq - 2 * sums.qx)
        if self._grid.e is None:
            return error
        return error + offset * (offset * self._of_v + 2 * (self._of_vx - scale * sums.q))

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step 1 without minima: the scale of each group, zeros, and how much the error grows with its square."""
        inverse = _inverses_tried(self._x, self._grid.points)
        sums = self._sums(inverse, inverse)
        scale, curvature = _best_scale(sums.qx, sums.qq)
        return scale, torch.zeros_like(scale), curvature

    def _minima(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step 1 with minima."""
        low, high = self._x.amin(0), self._x.amax(0)
        is_below_zero = self._grid.minimum_steps is not None  # - e t cannot be positive
        if is_below_zero:
            low = low.clamp_(max=0)
        sums = self._sums(_multiples(_inverse(high - low), self._grid.points.ends_tried), -low)
        scale, minimum = self._line(sums, is_below_zero=is_below_zero)
        scale, minimum, curvature = _picked(self._error(sums, scale, -minimum), scale, minimum, sums.qq)
        return scale, minimum, curvature

    def _line(self, sums: _Sums, *, is_below_zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and minimum of each group with the least error for these points."""
        whole = self._of_v * sums.qq
        determinant = whole - sums.q.square()
        is_line = _is_less(_ROUNDING * whole, determinant)  # else all are on one point: scale or minimum is 0
        if is_below_zero:
            minimum = ((sums.qq * self._of_vx - sums.q * sums.qx) / determinant).nan_to_num_(0, 0, 0)
            minimum.clamp_(max=0).mul_(is_line)
            return ((sums.qx - minimum * sums.q) / sums.qq).nan_to_num_(0, 0, 0), minimum
        scale = ((self._of_v * sums.qx - self._of_vx * sums.q) / determinant).nan_to_num_(0, 0, 0).mul_(is_line)
        return scale, (self._of_vx - scale * sums.q) / self._of_v

    def _try_integers(self, steps: Points) -> None:
        """Step 3: the integers beside those of each group."""
        now, minima = self._now, self._grid.minimum_steps
        s = torch.stack([self.s + more for more in ((0, -1, 1) if minima is not None else (-1, 1))])
        scale = self.d * s.clamp_(steps.lowest, steps.highest)
        if minima is None:
            t = self.t.expand_as(s)
        else:  # the best offsets where points stay the same
            wanted = (scale * now.q - self._of_vx) / (self._of_v * self.e)
            t = wanted.nan_to_num_(0, 0, 0).round_().clamp_(0, minima.highest)
        offset = self.e * t
        sums = self._sums(_inverse(scale), offset)
        errors = [self._error(now, self.d * self.s, self.e * self.t), *self._error(sums, scale, offset)]
        both = [[old, *new] for old, new in zip((self.s, self.t, *now), (s, t, *sums), strict=True)]
        self.s, self.t, *picked = _picked(errors, *both)
        self._now = _Sums(*picked)

    def _refit(self) -> None:
        """Step 3: d and e again, where this lessens the error of the block."""
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
        d, e = (_half(x).nan_to_num_(0, 0, 0) for x in (d, e))
        scale, offset = d * s, e * t
        found = self._sums(_inverse(scale), offset)
        errors = _sum(self._error(sums, self.d * s, self.e * t)), _sum(self._error(found, scale, offset))
        self.d, self.e, *picked = _picked(errors, (self.d, d), (self.e, e), *zip(sums, found, strict=True))
        self._now = _Sums(*picked)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 for a scale of 0."""
    return scale.reciprocal().nan_to_num_(0, 0, 0)


def _is_less(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1.0 where a < b, else 0.0: what follows is vectorized, and ten times as fast as `where` with truth values."""
    return torch.lt(a, b, out=a.new_empty(0))


def _picked(errors: Iterable[torch.Tensor], *parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of some candidates the finite numbers [...] of the one with the least error [...], the first of equals.

    `argmin` and `gather`, which are not vectorized over these axes, would take a third of all the time.
    """
    (least, *others), (first, *candidates) = errors, zip(*parts, strict=True)
    found = [number.clone() for number in first]
    for error, candidate in zip(others, candidates, strict=True):
        is_better = _is_less(error, least)
        least = torch.minimum(error, least)
        for number, new in zip(found, candidate, strict=True):
            number.lerp_(new, is_better)
    return found


def _multiples(x: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """Numbers [...] times each of some factors, [factors, ...]."""
    return x * torch.tensor(factors).view(-1, *[1] * x.dim())


def _inverses_tried(x: torch.Tensor, points: Points) -> torch.Tensor:
    """Factors [candidates, ...] that put the number of [n, ...] farthest from 0 near an end of the points."""
    high, low = x.amax(0), x.amin(0)
    extreme = low.lerp_(high, _is_less(-low, high)) if points.lowest < 0 else high
    return _multiples(_inverse(extreme), points.ends_tried)


def _best_scale(qx: torch.Tensor, qq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of some scales by the sums [candidates, ...] for their points, and the sum of q^2 there."""
    scale = (qx / qq).nan_to_num_(0, 0, 0)
    scale, curvature = _picked((scale * qx).neg_(), scale, qq)
    return scale, curvature


def _shared(scale: torch.Tensor, curvature: torch.Tensor, steps: Points | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2: d [blocks] and s [groups, blocks] with d s near to scales [groups, blocks].

    Args:
        curvature: how much the squared distance of each counts.
        steps: the values of s; None: the scale is d itself.
    """
    if steps is None:
        return _half(scale[0]), torch.ones_like(scale)
    s = steps.nearest_(scale.unsqueeze(1) * _inverses_tried(scale, steps))
    weighted = curvature.unsqueeze(1) * s
    d = _half(_best_scale(_sum(weighted * scale.unsqueeze(1)), _sum(weighted * s))[0])
    return d, steps.nearest_((scale / d).nan_to_num_(0, 0, 0))


def _half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16; 0 for 0 / 0."""
    return x.half().float().nan_to_num_(0, torch.inf, -torch.inf)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, whose length is a power of two."""
    if len(x) == 1:
        return x[0]
    half = len(x) // 2
    return _fold_(x[:half] + x[half:])


def _fold_(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, whose length is a power of two; x is scratch afterwards.

    Halves are added to each other, so that the bits of a sum depend on what is summed alone: `torch.sum` takes another
    order in some of the columns, and which ones depends on how many rows are worked on at once.
    """
    n = len(x)
    while n > 1:
        n //= 2
        x[:n].add_(x[n : 2 * n])
    return x[0]
