"""Was a model decoded with its own base, or with an unrelated one of the same layout?

A tuned weight t lies close to its base b. Where a power of two lies between them, their bit patterns differ in the
exponent and in nearly all high bits, though as integers they are neighbours: the exclusive or is a carry. Decoding with
another base o puts that pattern on another weight, where it is no carry: t ^ b ^ o is far from o. So of the weights
whose exponent differs from the base's, nearly all are close to it as integers for the right base, few for an unrelated
one. Simulated for normal and heavy-tailed weights, tuning of 0.2 % to 10 % of their size: 0.92 to 1.00 for the right
base, 0.11 to 0.18 for an unrelated one. Another tuned version of the base (3 % away) gives 0.85 to 1.00: only hashes
tell that. Weights below half of the root mean square are left out: they cross powers of two for other reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.lazy_imports import np
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.spec import DType
from llmkit.transforms.delta.base_check import MATRICES, sampled_rows

# An unrelated base gives less than FEW (0.18 at most), the right one more than HALF (0.42 at least) while …
FEW, HALF = 0.25, 0.4
# … tuning moved weights by less than 30 %. With more, this share of the exponents differs: the figure tells nothing.
MANY = 0.35
MIN_CROSSING = 1000
_MANTISSA = {DType.F16: 10, DType.BF16: 7, DType.F32: 23}


@dataclass(frozen=True)
class Kinship:
    """What the samples say.

    Attributes:
        n_samples: weights compared.
        n_crossing: of them those whose exponent differs.
        close: the share of these that are less than half a power of two away.
    """

    n_samples: int
    n_crossing: int
    close: float

    @property
    def is_telling(self) -> bool:
        """False with too few samples, or weights too far from the base's."""
        return self.n_crossing >= MIN_CROSSING and self.n_crossing <= MANY * self.n_samples


def measure_kinship(decoded: Checkpoint, base: Checkpoint) -> Kinship:
    """Compare a few blocks of rows of matrices that both have."""
    pairs = [
        (name, lazy, base.tensors[name])
        for name, lazy in decoded.tensors.items()
        if name in base.tensors and _is_comparable(lazy, base.tensors[name])
    ]
    n = n_crossing = n_close = 0
    for name, mine, theirs in pairs[:: max(len(pairs) // MATRICES, 1)]:
        for rows in sampled_rows(theirs, name):
            samples, crossing, close = _compare(mine, theirs, rows)
            n, n_crossing, n_close = n + samples, n_crossing + crossing, n_close + close
    return Kinship(n, n_crossing, n_close / max(n_crossing, 1))


def _is_comparable(a: Lazy, b: Lazy) -> bool:
    is_plain = all(isinstance(x.node, Read) and x.node.strides is None for x in (a, b))
    return is_plain and a.spec == b.spec and len(a.shape) == 2 and a.dtype in _MANTISSA


def _compare(mine: Lazy, theirs: Lazy, rows: tuple[int, int]) -> tuple[int, int, int]:
    width = mine.dtype.bits
    mantissa = _MANTISSA[mine.dtype]
    low = (1 << (width - 1)) - 1  # without the sign
    d, o = (np.frombuffer(_rows(x, rows), f"<u{width // 8}").astype(np.int64) & low for x in (mine, theirs))
    sizes = np.ldexp(
        1.0 + (o & ((1 << mantissa) - 1)) / (1 << mantissa), (o >> mantissa) - (1 << (width - 2 - mantissa))
    )
    chosen = sizes >= 0.5 * np.sqrt(np.mean(sizes**2))
    crossing = chosen & ((d ^ o) >= (1 << mantissa))
    close = crossing & (np.abs(d - o) < (1 << (mantissa - 1)))
    return int(chosen.sum()), int(crossing.sum()), int(close.sum())


def _rows(lazy: Lazy, rows: tuple[int, int]) -> bytes:
    node = lazy.node
    if not isinstance(node, Read):
        raise TypeError("no stored tensor")
    nbytes = lazy.spec.row_nbytes
    return node.source.read(node.offset + rows[0] * nbytes, (rows[1] - rows[0]) * nbytes)
