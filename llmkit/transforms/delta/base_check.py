"""Is this the base that the delta was made from? Measured on a few megabytes of both, before hours of work.

The telling figure is exactness. A delta was made as tuned - base in some float type. Where it is at most half as large
as the base's weight, that difference was exact (Sterbenz' lemma), so adding it back gives a number of that type without
rounding: for the right base in 0 of any number of samples. For another base the sum needs rounding in about 30 % of
the samples (it lies on the finer grid of the wrong neighbour), for another tuned version or a copy rounded to bfloat16
in 0.3 to 10 % (only where a weight crossed a power of two). For the tuned model itself base + delta needs rounding and
base - delta does not. A delta that was rounded after it was made, float32 to half, needs rounding with its own base
too: hence a warning, never a refusal, unless the sign tells. Figures of tests/transforms/test_base_check.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import MARKER_NAME
from llmkit.lazy_imports import np
from llmkit.tensors.lazy import Context, Lazy, Read
from llmkit.tensors.spec import DType
from llmkit.transforms.delta.base_identity import identity_findings
from llmkit.transforms.delta.base_structure import Finding
from llmkit.transforms.delta.detect import detect
from llmkit.transforms.delta.profiles import Profile, Rule, find_profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[Any]

# Sampling: matrices spread over the model, a few blocks of rows of each, and every norm weight.
MATRICES, BLOCKS, BLOCK_NUMEL, VECTORS = 16, 4, 2**15, 512
# The right base gives exactly 0; the least that another tuned version gave is 0.003.
INEXACT = 1e-4
ANOTHER_BASE = 0.15
MIN_SAMPLES = 1000
# Share of a float16 model's weights that bfloat16 holds too: 0.126 of genuine ones, 0.999 of rounded ones.
BF16_ROUNDED = 0.9
_NUMPY = {DType.F64: "<f8", DType.F32: "<f4", DType.F16: "<f2"}


@dataclass
class Measurement:
    """Figures from the samples of the matrices and of the norm weights.

    Attributes:
        matrices: sums over the sampled blocks of matrices.
        norms: sums over norm weights; `norms.n` is 0 without any.
    """

    matrices: _Sums
    norms: _Sums


def check_base(base: Checkpoint, delta: Checkpoint, *, profile: str | None = None) -> list[Finding]:
    """Findings about the pair from a few samples of its data (some megabytes); the most telling first.

    A delta made by llmkit is compared by the hashes in its manifest, any other by statistics.
    """
    if MARKER_NAME in delta.files:
        return identity_findings(base, delta)
    chosen = find_profile(profile) if profile is not None else detect(base, delta).profile
    if chosen is None:
        return identity_findings(base, delta)
    return judge(measure(base, delta, chosen), base.label, delta.label)


def measure(base: Checkpoint, delta: Checkpoint, profile: Profile) -> Measurement:
    """Sample the tensors that the profile adds, and compute the figures."""
    measurement = Measurement(_Sums(), _Sums())
    for name, of_base, of_delta in _pairs(base, delta, profile):
        arithmetic = profile.arithmetic_of(of_delta.dtype, of_base.dtype)
        is_matrix = len(of_delta.shape) > 1
        into = measurement.matrices if is_matrix else measurement.norms
        for rows in sampled_rows(of_base, name, of_delta) if is_matrix else [(0, of_delta.spec.n_rows)]:
            b, d = (rounded(_values(lazy, rows), arithmetic) for lazy in (of_base, of_delta))
            into.add(b, d, of_base.dtype, arithmetic)
    return measurement


def _values(lazy: Lazy, rows: tuple[int, int]) -> Values:
    """Rows of a tensor, exactly; without torch where they lie in a file."""
    if lazy.dtype is DType.BF16:
        bits = np.frombuffer(Context().row_bytes(lazy, rows), "<u2").astype("<u4") << 16
        return bits.view("<f4").astype("<f8")
    if lazy.dtype in _NUMPY:
        return np.frombuffer(Context().row_bytes(lazy, rows), _NUMPY[lazy.dtype]).astype("<f8")
    values: Values = Context().rows(lazy, rows).double().numpy().reshape(-1)
    return values


def rounded(x: Values, dtype: DType) -> Values:
    """The nearest number of a type to each; the even one where two are as near."""
    with np.errstate(all="ignore"):
        if dtype is not DType.BF16:
            return x.astype(_NUMPY[dtype]).astype("<f8")
        narrow = x.astype("<f4")
        bits = narrow.view("<u4")
        upper = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view("<f4")
        return np.where(np.isnan(narrow), narrow, upper).astype("<f8")


def bf16_share(ckpt: Checkpoint) -> float | None:
    """The share of sampled float16 weights whose three lowest bits are zero; None with too few to tell."""
    matrices = [
        (name, lazy.node)
        for name, lazy in ckpt.tensors.items()
        if lazy.dtype is DType.F16 and len(lazy.shape) == 2 and isinstance(lazy.node, Read) and not lazy.node.strides
    ]
    n = n_rounded = 0
    for name, node in matrices[:: max(len(matrices) // MATRICES, 1)]:
        row_nbytes = node.specs[0].row_nbytes
        for start, stop in sampled_rows(node.output(), name):
            bits = np.frombuffer(node.source.read(node.offset + start * row_nbytes, (stop - start) * row_nbytes), "<u2")
            weights = bits[(bits & 0x7FFF) != 0]
            n += len(weights)
            n_rounded += int(((weights & 7) == 0).sum())
    return n_rounded / n if n >= MIN_SAMPLES else None


def _pairs(base: Checkpoint, delta: Checkpoint, profile: Profile) -> Iterator[tuple[str, Lazy, Lazy]]:
    matrices, vectors = [], []
    for name, of_delta in delta.tensors.items():
        of_base = base.tensors.get(name.removeprefix(profile.base_prefix)) or base.tensors.get(name)
        if of_base is None or profile.rule_for(name) is not Rule.ADD:
            continue
        first, second = of_base.spec, of_delta.spec
        is_sum = first.shape == second.shape and first.dtype.is_float and second.dtype.is_float
        if not is_sum or of_base.node.row_step is None:
            continue
        if len(second.shape) == 2 and of_delta.node.row_step is not None:
            matrices.append((name, of_base, of_delta))
        elif len(second.shape) == 1 and not name.endswith("bias"):
            vectors.append((name, of_base, of_delta))
    for chosen, limit in ((matrices, MATRICES), (vectors, VECTORS)):
        yield from (chosen[i * len(chosen) // limit] for i in range(limit)) if len(chosen) > limit else chosen


def sampled_rows(lazy: Lazy, name: str, other: Lazy | None = None) -> list[tuple[int, int]]:
    """A few blocks of rows, at places that differ from tensor to tensor and are the same in every run.

    Both ends of a block are where `lazy`, and `other` of the same shape, may be cut.
    """
    n, step = lazy.spec.n_rows, lcm(lazy.node.row_step or 1, (other or lazy).node.row_step or 1)
    rows = max(BLOCK_NUMEL // max(lazy.spec.numel // max(n, 1), 1), 1)
    rows = -(-rows // step) * step  # a layout that reorders rotary pairs gives whole heads only
    if n <= BLOCKS * rows:
        return [(0, n)]
    offset = sum(name.encode()) % max(n // BLOCKS - rows, 1)
    starts = [(i * n // BLOCKS + offset) // step * step for i in range(BLOCKS)]
    return [(start, min(start + rows, n)) for start in starts]


@dataclass
class _Sums:
    """Running sums over samples b of the base and d of the delta, and the figures that follow from them.

    Attributes:
        n: weights compared.
        bb, dd, bd, b, d: sums of squares, products and values.
        positive_b, positive_d: weights of the base and of the delta above zero.
        flipped: weights whose sign the delta changes.
        n_grid: samples that the exactness is measured on; of them
        n_inexact, n_inexact_back: base + delta, base - delta needs rounding.
        n_half, n_on_bf16: non-zero weights of a float16 base, and those of them that bfloat16 holds too.
        n_wide, n_wide_off, n_back_off: of a float32 base: samples, base and base - delta that half precision lacks.
    """

    n: int = 0
    bb: float = 0.0
    dd: float = 0.0
    bd: float = 0.0
    b: float = 0.0
    d: float = 0.0
    positive_b: int = 0
    positive_d: int = 0
    flipped: int = 0
    n_grid: int = 0
    n_inexact: int = 0
    n_inexact_back: int = 0
    n_half: int = 0
    n_on_bf16: int = 0
    n_wide: int = 0
    n_wide_off: int = 0
    n_back_off: int = 0

    @property
    def ratio(self) -> float:
        """rms(delta) / rms(base)."""
        return (self.dd / self.bb) ** 0.5 if self.bb > 0 else (float("inf") if self.dd > 0 else 0.0)

    @property
    def correlation(self) -> float:
        """Of base and base + delta."""
        squares = self.bb + 2 * self.bd + self.dd
        return _correlation(self.n, self.b, self.b + self.d, self.bb, squares, self.bb + self.bd)

    @property
    def delta_correlation(self) -> float:
        """Of base and delta."""
        return _correlation(self.n, self.b, self.d, self.bb, self.dd, self.bd)

    @property
    def inexact(self) -> float:
        """The share of base + delta that needs rounding."""
        return self.n_inexact / max(self.n_grid, 1)

    @property
    def bf16_share(self) -> float:
        """The share of a float16 base's weights that bfloat16 holds too; 0 for other dtypes."""
        return self.n_on_bf16 / max(self.n_half, 1)

    @property
    def leaves_half(self) -> bool:
        """The base is of no half precision, base - delta is: it is the tuned model in float32."""
        n = max(self.n_wide, 1)
        return self.n_wide >= MIN_SAMPLES and self.n_wide_off / n > 0.5 and self.n_back_off / n < INEXACT

    def add(self, b: Values, d: Values, stored: DType, arithmetic: DType) -> None:
        """Take in one block of base and delta, both rounded to `arithmetic`; the base is `stored` in another type."""
        self.n += len(b)
        for key, value in (("bb", b * b), ("dd", d * d), ("bd", b * d), ("b", b), ("d", d)):
            setattr(self, key, getattr(self, key) + float(value.sum()))
        self.positive_b += int((b > 0).sum())
        self.positive_d += int((d > 0).sum())
        self.flipped += int((((b > 0) != (b + d > 0)) & (b != 0)).sum())
        exact = (d != 0) & (abs(d) <= 0.49 * abs(b))
        self.n_grid += int(exact.sum())
        grid = self._grid(b, d, exact, arithmetic)
        self.n_inexact += int((_is_off(b, d, grid) & exact).sum())
        self.n_inexact_back += int((_is_off(b, -d, grid) & exact).sum())
        if stored is DType.F16:
            self.n_half += int((b != 0).sum())
            self.n_on_bf16 += int(((rounded(b, DType.BF16) == b) & (b != 0)).sum())
        if stored is DType.F32:
            self.n_wide += int(exact.sum())
            self.n_wide_off += int(((rounded(b, DType.F16) != b) & exact).sum())
            back = b - d
            are_off = [rounded(back, narrow) != back for narrow in (DType.F16, DType.BF16)]
            self.n_back_off += int((are_off[0] & are_off[1] & exact).sum())

    @staticmethod
    def _grid(b: Values, d: Values, exact: Values, dtype: DType) -> DType:
        """The narrowest type that most sums are in: a float32 delta may be one of half-precision weights."""
        n = int(exact.sum())
        if dtype is not DType.F32 or not n:
            return dtype
        for narrow in (DType.F16, DType.BF16):
            if int((_is_off(b, d, narrow) & exact).sum()) < 0.5 * n:
                return narrow
        return dtype


def _is_off(b: Values, d: Values, grid: DType) -> Values:
    """Where b + d is no number of the type `grid` (float64 holds the sum, or shows that it does not)."""
    total = b + d
    is_off: Values = (rounded(total, grid) != total) | (total - b != d)
    return is_off


def _correlation(n: int, sx: float, sy: float, sxx: float, syy: float, sxy: float) -> float:
    vx, vy = sxx - sx * sx / n, syy - sy * sy / n
    return (sxy - sx * sy / n) / (vx * vy) ** 0.5 if vx > 0 and vy > 0 else 0.0


def judge(measured: Measurement, base: str, delta: str) -> list[Finding]:
    """What the figures mean, certain findings first."""
    n_samples = measured.matrices.n + measured.norms.n
    if n_samples == 0:
        return [Finding("note", "unmeasured", f"{base} and {delta} share no float tensors that could be sampled")]
    if measured.matrices.ratio == 0:
        return [Finding("warn", "zero", f"{delta} is zero in all {n_samples} samples", "check the delta", 0.0)]
    return [*_roles(measured, base, delta), *_exactness(measured.matrices, measured.norms, base, delta)]


def _roles(measured: Measurement, base: str, delta: str) -> list[Finding]:
    """Full weights where a delta should be, and the other way round."""
    matrices, norms = measured.matrices, measured.norms
    ratio, n = matrices.ratio, max(norms.n, 1)
    base_positive, delta_positive = norms.positive_b / n, norms.positive_d / n
    if ratio > 0.5 and (base_positive < 0.8 if norms.n else ratio > 5):
        message = f"{base} looks like a delta: its weights have {1 / ratio:.3g} times the size of those of {delta}" + (
            f", and only {base_positive:.0%} of its norm weights are positive" if norms.n else ""
        )
        hint = "llmkit delta apply BASE DELTA -o OUT: the base model comes first"
        return [Finding("refuse", "delta_as_base", message, hint, ratio, 0.5)]
    is_model = delta_positive > 0.9 and norms.ratio > 0.3
    if ratio > 0.3 and (is_model if norms.n else matrices.delta_correlation > 0.8):
        message = (
            f"{delta} looks like a full model: its weights have {ratio:.3g} times the size of those of {base}, "
            f"correlation {matrices.delta_correlation:.3f}"
            + (f", {delta_positive:.0%} of its norm weights are positive" if norms.n else "")
        )
        return [Finding("refuse", "model_as_delta", message, "use it as it is: it needs no base", ratio, 0.3)]
    return []


def _exactness(sums: _Sums, norms: _Sums, base: str, delta: str) -> list[Finding]:
    figure = f"{sums.inexact:.2%} of {sums.n_grid} sampled sums need rounding, for the right base none does"
    if sums.leaves_half:
        message = f"{base} is already tuned with {delta}: only without the delta are its weights of half precision"
        return [Finding("refuse", "tuned", message, "give the untouched base", sums.inexact, INEXACT)]
    if sums.n_grid < MIN_SAMPLES:
        return _shape_of_result(sums, norms, base)
    if sums.inexact <= INEXACT:
        message = (
            f"base check: 0 of {sums.n_grid} sampled sums need rounding, as for the base a delta was made from"
            if sums.inexact == 0
            else f"base check: {figure}"
        )
        return [Finding("note", "exact", message, None, sums.inexact, INEXACT)]
    if sums.n_inexact_back <= INEXACT * sums.n_grid:
        message = f"{base} is already tuned with {delta}: base - delta is exact, base + delta is not ({figure})"
        return [Finding("refuse", "tuned", message, "give the untouched base", sums.inexact, INEXACT)]
    if sums.bf16_share > BF16_ROUNDED:
        message = (
            f"{base} was rounded to bfloat16 and stored as float16 ({sums.bf16_share:.1%} of its weights have three "
            f"zero low bits, usually 13 %): the result differs from the published model in the low bits ({figure})"
        )
        return [Finding("warn", "bf16_rounded", message, "convert the original float16 files again",
                        sums.bf16_share, BF16_ROUNDED)]  # fmt: skip
    if sums.inexact > ANOTHER_BASE:
        what, hint = "is probably not the base", "give the base that the delta's model card names"
    else:
        what, hint = "is probably another version of the base, such as a tuned one,", "give the untouched base"
    message = f"{base} {what} that {delta} was made from: {figure} (unless the delta was rounded after it was made)"
    return [Finding("warn", "inexact", message, hint, sums.inexact, INEXACT), *_shape_of_result(sums, norms, base)]


def _shape_of_result(sums: _Sums, norms: _Sums, base: str) -> list[Finding]:
    findings = []
    flipped = norms.flipped / max(norms.n, 1)
    if sums.correlation < 0.95:
        message = f"the result is far from {base}: correlation {sums.correlation:.3f}, usually above 0.95"
        findings.append(Finding("warn", "far", message, "check base and delta", sums.correlation, 0.95))
    if flipped > 0.01:
        message = f"the delta changes the sign of {flipped:.1%} of the norm weights of {base}, usually of none"
        findings.append(Finding("warn", "norms", message, "check base and delta", flipped, 0.01))
    return findings
