"""How exactly base + delta restores the tuned model, in ulps of the stored type."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.slices import common_slices, load_rows
from llmkit.transforms.delta.arithmetic import ordinal, ulp_dtype

_BLOCK_NBYTES = 8 * 2**20


@dataclass
class RoundTrip:
    """The count.

    Attributes:
        n: weights compared.
        n_exact: every bit is the same (or both are zero, or both NaN).
        n_beyond: more than one ulp apart.
        worst_ulps: the largest distance.
        worst: the tensor it is in.
        missing: tensors of the tuned model that do not come back with the same dtype and shape.
    """

    n: int = 0
    n_exact: int = 0
    n_beyond: int = 0
    worst_ulps: int = 0
    worst: str = ""
    missing: tuple[str, ...] = ()

    @property
    def is_within_one_ulp(self) -> bool:
        """Whether every weight is restored within one ulp."""
        return self.n_beyond == 0 and not self.missing

    def describe(self) -> str:
        """The count in one line."""
        if self.n_exact == self.n and not self.missing:
            return f"all {self.n} weights come back bit for bit"
        text = f"{self.n_exact} of {self.n} weights come back exactly, {self.n - self.n_exact - self.n_beyond} within "
        text += f"one ulp, {self.n_beyond} not"
        if self.n_beyond:
            text += f" (at most {self.worst_ulps} ulps, in {self.worst})"
        if self.missing:
            text += f"; {len(self.missing)} tensors have another dtype or shape"
        return text


def measure_round_trip(tuned: Checkpoint, back: Checkpoint) -> RoundTrip:
    """Compare `back`, such as `apply(base, make(base, tuned))`, with `tuned`, a few megabytes of both at a time."""
    trip = RoundTrip()
    missing = []
    for name, want in tuned.tensors.items():
        if not want.dtype.is_float or want.spec.numel == 0:
            continue
        got = back.tensors.get(name)
        if got is None or got.spec != want.spec:
            missing.append(name)
            continue
        for rows in common_slices(want, got, _BLOCK_NBYTES):
            _count(trip, name, want, got, rows)
    trip.missing = tuple(missing)
    return trip


def _count(trip: RoundTrip, name: str, want: Lazy, got: Lazy, rows: tuple[int, int]) -> None:
    integers = ulp_dtype(want.dtype).torch
    x, y = (load_rows(lazy, rows) for lazy in (want, got))
    # Integers of the width: a distance beyond their range can only be too small by wrapping, so go one wider.
    wide = torch.int64
    distance = (ordinal(x.view(integers)).to(wide) - ordinal(y.view(integers)).to(wide)).abs()
    distance[(x == y) | (x.isnan() & y.isnan())] = 0
    trip.n += distance.numel()
    trip.n_exact += int((distance == 0).sum())
    trip.n_beyond += int((distance > 1).sum())
    largest = int(distance.max())
    if largest > trip.worst_ulps:
        trip.worst_ulps, trip.worst = largest, name
