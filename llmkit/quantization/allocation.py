"""Which of several sizes each matrix gets, so that the sum of errors is small within a budget of bytes.

A multiple-choice knapsack. Every matrix begins at its smallest size; then, of the steps along the lower convex hulls of
(bytes, error), those that lower the error most per byte are taken as long as they fit, and what room is left goes to
whatever single change still lowers it most. Where the budget ends with a step of a hull the result is optimal;
elsewhere its error is above the least by less than the gain of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Size:
    """One way to store a matrix: what it takes, and what it loses."""

    nbytes: int
    error: float


def least_nbytes(sizes: Sequence[Sequence[Size]]) -> int:
    """The sum of the smallest sizes."""
    return sum(min(size.nbytes for size in options) for options in sizes)


def allocate(sizes: Sequence[Sequence[Size]], budget: int) -> list[int]:
    """The index of the size that each matrix gets; the same for the same numbers.

    Args:
        sizes: of each matrix, in any order.
        budget: of all of them together; at least `least_nbytes`.
    """
    hulls = [_hull(options) for options in sizes]
    chosen = [hull[0] for hull in hulls]
    remaining = budget - sum(options[i].nbytes for options, i in zip(sizes, chosen, strict=True))
    steps = [
        (-_slope(sizes[m][before], sizes[m][after]), m, before, after)
        for m, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    for _, m, before, after in sorted(steps):
        extra = sizes[m][after].nbytes - sizes[m][before].nbytes
        if chosen[m] == before and extra <= remaining:
            chosen[m], remaining = after, remaining - extra
    while True:
        changes = [
            (sizes[m][i].error - sizes[m][now].error, m, i)
            for m, now in enumerate(chosen)
            for i in range(len(sizes[m]))
            if sizes[m][i].error < sizes[m][now].error and sizes[m][i].nbytes - sizes[m][now].nbytes <= remaining
        ]
        if not changes:
            return chosen
        _, m, i = min(changes)
        remaining -= sizes[m][i].nbytes - sizes[m][chosen[m]].nbytes
        chosen[m] = i


def _slope(small: Size, large: Size) -> float:
    """The error saved per byte."""
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _hull(sizes: Sequence[Size]) -> list[int]:
    """Indices of the sizes on the lower convex hull, smallest first; each has less error than the one before."""
    hull: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i].nbytes, sizes[i].error, i)):
        if hull and sizes[i].error >= sizes[hull[-1]].error:
            continue
        while len(hull) > 1 and _slope(sizes[hull[-2]], sizes[hull[-1]]) <= _slope(sizes[hull[-1]], sizes[i]):
            hull.pop()
        hull.append(i)
    return hull
