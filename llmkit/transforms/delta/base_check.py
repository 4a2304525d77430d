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
from typing import TYPE_CHECKING

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.tensors.lazy import Context, Lazy, Read
from llmkit.tensors.spec import DType
from llmkit.transforms.delta.base_identity import identity_findings
from llmkit.transforms.delta.base_structure import Finding
from llmkit.transforms.delta.detect import detect
from llmkit.transforms.delta.marker import MARKER_NAME
from llmkit.transforms.delta.profiles import Profile, Rule, find_profile

if TYPE_CHECKING:
    import torch

__all__ = ["BF16_ROUNDED", "MATRICES", "Measurement", "bf16_share", "check_base", "judge", "measure", "sample_blocks"]

# Sampling: matrices spread over the model, a few blocks of rows of each, and every norm weight.
MATRICES, BLOCKS, BLOCK_NUMEL, VECTORS = 16, 4, 2**15, 512
# The right base gives exactly 0; the least that another tuned version gave is 0.003.
INEXACT = 1e-4
ANOTHER_BASE = 0.15
MIN_SAMPLES = 1000
# Share of a float16 model's weights that bfloat16 holds too: 0.126 of genuine ones, 0.999 of rounded ones.
BF16_ROUNDED = 0.9


@dataclass
class Measurement:
    """What the samples say.

    Attributes:
        n_samples: weights compared.
        ratio: rms(delta) / rms(base) over the matrices.
        correlation: of base and base + delta.
        base_delta_correlation: of base and delta.
        n_grid: samples the exactness was measured on.
        inexact: share of base + delta that needs rounding.
        inexact_back: share of base - delta that needs rounding.
        norm_ratio: rms(delta) / rms(base) over the norm weights; None without any.
        base_positive: share of the base's norm weights above zero.
        delta_positive: share of the delta's norm weights above zero.
        flipped: share of the norm weights whose sign the delta changes.
        bf16_share: share of a half-precision base's weights that bfloat16 holds too; None for other dtypes.
        leaves_half: the base is on no half-precision grid, base - delta is: it is the tuned model in float32.
    """

    n_samples: int = 0
    ratio: float = 0.0
    correlation: float = 1.0
    base_delta_correlation: float = 0.0
    n_grid: int = 0
    inexact: float = 0.0
    inexact_back: float = 0.0
    norm_ratio: float | None = None
    base_positive: float = 1.0
    delta_positive: float = 0.0
    flipped: float = 0.0
    bf16_share: float | None = None
    leaves_half: bool = False


def check_base(base: Checkpoint, delta: Checkpoint, *, profile: str | None = None) -> list[Finding]:
    """Findings about the pair from a few samples of its data (some megabytes); the most telling first.

    A delta made by llmkit is compared by the hashes in its manifest, any other by statistics.
    """
    if MARKER_NAME in delta.files:
        return identity_findings(base, delta)
    found = find_profile(profile) if profile is not None else detect(base, delta).profile
    if found is None:
        return identity_findings(base, delta)
    return judge(measure(base, delta, found), base.label, delta.label)


def measure(base: Checkpoint, delta: Checkpoint, profile: Profile) -> Measurement:
    """Sample the tensors that the profile adds, and compute the figures."""
    import torch

    sums, norms = _Sums(), _Sums()
    with torch.inference_mode():
        for name, mine, theirs in _pairs(base, delta, profile):
            arithmetic = profile.arithmetic_of(theirs.dtype, mine.dtype)
            into = sums if len(theirs.shape) > 1 else norms
            for rows in sample_blocks(mine, name, theirs) if len(theirs.shape) > 1 else [(0, theirs.spec.n_rows)]:
                b, d = Context().rows(mine, rows), Context().rows(theirs, rows)
                into.add(b, d, arithmetic)
    return _summed(sums, norms)


def bf16_share(ckpt: Checkpoint) -> float | None:
    """The share of sampled float16 weights whose three lowest bits are zero; None with too few to tell."""
    import numpy as np

    found = [
        (name, lazy.node)
        for name, lazy in ckpt.tensors.items()
        if lazy.dtype is DType.F16 and len(lazy.shape) == 2 and isinstance(lazy.node, Read) and not lazy.node.strides
    ]
    n = n_rounded = 0
    for name, node in found[:: max(len(found) // MATRICES, 1)]:
        row_nbytes = node.specs[0].row_nbytes
        for start, stop in sample_blocks(node.output(), name):
            bits = np.frombuffer(node.source.read(node.offset + start * row_nbytes, (stop - start) * row_nbytes), "<u2")
            weights = bits[(bits & 0x7FFF) != 0]
            n += len(weights)
            n_rounded += int(((weights & 7) == 0).sum())
    return n_rounded / n if n >= MIN_SAMPLES else None


def _pairs(base: Checkpoint, delta: Checkpoint, profile: Profile) -> Iterator[tuple[str, Lazy, Lazy]]:
    matrices, vectors = [], []
    for name, theirs in delta.tensors.items():
        mine = base.tensors.get(name.removeprefix(profile.base_prefix)) or base.tensors.get(name)
        if mine is None or profile.rule_for(name) is not Rule.ADD or mine.shape != theirs.shape:
            continue
        if not (mine.dtype.is_float and theirs.dtype.is_float) or mine.node.row_step is None:
            continue
        if len(theirs.shape) == 2 and theirs.node.row_step is not None:
            matrices.append((name, mine, theirs))
        elif len(theirs.shape) == 1 and not name.endswith("bias"):
            vectors.append((name, mine, theirs))
    for chosen, limit in ((matrices, MATRICES), (vectors, VECTORS)):
        yield from (chosen[i * len(chosen) // limit] for i in range(limit)) if len(chosen) > limit else chosen


def sample_blocks(lazy: Lazy, name: str, other: Lazy | None = None) -> list[tuple[int, int]]:
    """A few blocks of rows, at places that differ from tensor to tensor and are the same in every run.

    Both ends of a block are where `lazy`, and `other` of the same shape, may be cut.
    """
    n, step = lazy.spec.n_rows, lcm(lazy.node.row_step or 1, (other or lazy).node.row_step or 1)
    rows = max(BLOCK_NUMEL // max(lazy.spec.numel // max(n, 1), 1), 1)
    rows = -(-rows // step) * step  # a layout that turns rotary pairs round gives whole heads only
    if n <= BLOCKS * rows:
        return [(0, n)]
    offset = sum(name.encode()) % max(n // BLOCKS - rows, 1)
    starts = [(i * n // BLOCKS + offset) // step * step for i in range(BLOCKS)]
    return [(start, min(start + rows, n)) for start in starts]


@dataclass
class _Sums:
    """Running sums over samples."""

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
    inexact: int = 0
    inexact_back: int = 0
    n_half: int = 0
    on_bf16: int = 0
    n_wide: int = 0
    wide_off: int = 0
    back_off: int = 0

    def add(self, base: torch.Tensor, delta: torch.Tensor, arithmetic: DType) -> None:
        """Take in one block of both."""
        stored = DType.of(base.dtype)
        dtype = arithmetic.torch
        b, d = base.to(dtype).double(), delta.to(dtype).double()
        self.n += b.numel()
        for key, value in (("bb", b * b), ("dd", d * d), ("bd", b * d), ("b", b), ("d", d)):
            setattr(self, key, getattr(self, key) + float(value.sum()))
        self.positive_b += int((b > 0).sum())
        self.positive_d += int((d > 0).sum())
        self.flipped += int(((b > 0) != (b + d > 0)).logical_and(b != 0).sum())
        exact = (d != 0) & (d.abs() <= 0.49 * b.abs())
        self.n_grid += int(exact.sum())
        grid = self._grid(b, d, exact, dtype)
        self.inexact += int((_is_off(b, d, grid) & exact).sum())
        self.inexact_back += int((_is_off(b, -d, grid) & exact).sum())
        if stored is DType.F16:
            self.n_half += int((b != 0).sum())
            self.on_bf16 += int(((b.bfloat16().double() == b) & (b != 0)).sum())
        if stored is DType.F32:
            self.n_wide += int(exact.sum())
            self.wide_off += int(((b.half().double() != b) & exact).sum())
            back = b - d
            self.back_off += int(((back.half().double() != back) & (back.bfloat16().double() != back) & exact).sum())

    @staticmethod
    def _grid(b: torch.Tensor, d: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
        """The narrowest type that most sums are in: a float32 delta may be one of half-precision weights."""
        import torch

        n = int(exact.sum())
        if dtype != torch.float32 or not n:
            return dtype
        for narrow in (torch.float16, torch.bfloat16):
            if int((_is_off(b, d, narrow) & exact).sum()) < 0.5 * n:
                return narrow
        return dtype


def _is_off(b: torch.Tensor, d: torch.Tensor, grid: torch.dtype) -> torch.Tensor:
    """Where b + d is no number of the type `grid` (float64 holds the sum, or shows that it does not)."""
    total = b + d
    return (total.to(grid).double() != total) | (total - b != d)


def _summed(sums: _Sums, norms: _Sums) -> Measurement:
    found = Measurement(n_samples=sums.n + norms.n)
    if sums.n:
        found.ratio = _root(sums.dd, sums.bb)
        found.base_delta_correlation = _correlation(sums.n, sums.b, sums.d, sums.bb, sums.dd, sums.bd)
        tt = sums.bb + 2 * sums.bd + sums.dd
        found.correlation = _correlation(sums.n, sums.b, sums.b + sums.d, sums.bb, tt, sums.bb + sums.bd)
        found.n_grid = sums.n_grid
        found.inexact = sums.inexact / max(sums.n_grid, 1)
        found.inexact_back = sums.inexact_back / max(sums.n_grid, 1)
        if sums.n_half:
            found.bf16_share = sums.on_bf16 / sums.n_half
        off, back = sums.wide_off / max(sums.n_wide, 1), sums.back_off / max(sums.n_wide, 1)
        found.leaves_half = sums.n_wide >= MIN_SAMPLES and off > 0.5 and back < INEXACT
    if norms.n:
        found.norm_ratio = _root(norms.dd, norms.bb)
        found.base_positive = norms.positive_b / norms.n
        found.delta_positive = norms.positive_d / norms.n
        found.flipped = norms.flipped / norms.n
    return found


def _root(a: float, b: float) -> float:
    return (a / b) ** 0.5 if b > 0 else (float("inf") if a > 0 else 0.0)


def _correlation(n: int, sx: float, sy: float, sxx: float, syy: float, sxy: float) -> float:
    vx, vy = sxx - sx * sx / n, syy - sy * sy / n
    return (sxy - sx * sy / n) / (vx * vy) ** 0.5 if vx > 0 and vy > 0 else 0.0


def judge(found: Measurement, base: str, delta: str) -> list[Finding]:
    """What the figures mean, certain findings first."""
    if found.n_samples == 0:
        return [Finding("note", "unmeasured", f"{base} and {delta} share no float tensors that could be sampled")]
    if found.ratio == 0:
        return [Finding("warn", "zero", f"{delta} is zero in all {found.n_samples} samples", "check the delta", 0.0)]
    return [*_roles(found, base, delta), *_exactness(found, base, delta)]


def _roles(found: Measurement, base: str, delta: str) -> list[Finding]:
    """Full weights where a delta should be, and the other way round."""
    has_norms = found.norm_ratio is not None
    if found.ratio > 0.5 and (found.base_positive < 0.8 if has_norms else found.ratio > 5):
        message = (
            f"{base} looks like a delta: its weights have {1 / found.ratio:.3g} times the size of those of {delta}"
            + (f", and only {found.base_positive:.0%} of its norm weights are positive" if has_norms else "")
        )
        hint = "llmkit delta apply BASE DELTA -o OUT: the base model comes first"
        return [Finding("refuse", "delta_as_base", message, hint, found.ratio, 0.5)]
    is_model = found.delta_positive > 0.9 and (found.norm_ratio or 0) > 0.3
    if found.ratio > 0.3 and (is_model if has_norms else found.base_delta_correlation > 0.8):
        message = (
            f"{delta} looks like a full model: its weights have {found.ratio:.3g} times the size of those of {base}, "
            f"correlation {found.base_delta_correlation:.3f}"
            + (f", {found.delta_positive:.0%} of its norm weights are positive" if has_norms else "")
        )
        return [Finding("refuse", "model_as_delta", message, "use it as it is: it needs no base", found.ratio, 0.3)]
    return []


def _exactness(found: Measurement, base: str, delta: str) -> list[Finding]:
    figure = f"{found.inexact:.2%} of {found.n_grid} sampled sums need rounding, for the right base none does"
    if found.leaves_half:
        message = f"{base} is already tuned with {delta}: only without the delta are its weights of half precision"
        return [Finding("refuse", "tuned", message, "give the untouched base", found.inexact, INEXACT)]
    if found.n_grid < MIN_SAMPLES:
        return _shape_of_result(found, base)
    if found.inexact <= INEXACT:
        message = (
            f"base check: 0 of {found.n_grid} sampled sums need rounding, as for the base a delta was made from"
            if found.inexact == 0
            else f"base check: {figure}"
        )
        return [Finding("note", "exact", message, None, found.inexact, INEXACT)]
    if found.inexact_back <= INEXACT:
        message = f"{base} is already tuned with {delta}: base - delta is exact, base + delta is not ({figure})"
        return [Finding("refuse", "tuned", message, "give the untouched base", found.inexact, INEXACT)]
    if found.bf16_share is not None and found.bf16_share > BF16_ROUNDED:
        message = (
            f"{base} was rounded to bfloat16 and stored as float16 ({found.bf16_share:.1%} of its weights have three "
            f"zero low bits, usually 13 %): the result differs from the published model in the low bits ({figure})"
        )
        return [Finding("warn", "bf16_rounded", message, "convert the original float16 files again",
                        found.bf16_share, BF16_ROUNDED)]  # fmt: skip
    if found.inexact > ANOTHER_BASE:
        what, hint = "is probably not the base", "give the base that the delta's model card names"
    else:
        what, hint = "is probably another version of the base, such as a tuned one,", "give the untouched base"
    message = f"{base} {what} that {delta} was made from: {figure} (unless the delta was rounded after it was made)"
    return [Finding("warn", "inexact", message, hint, found.inexact, INEXACT), *_shape_of_result(found, base)]


def _shape_of_result(found: Measurement, base: str) -> list[Finding]:
    findings = []
    if found.correlation < 0.95:
        message = f"the result is far from {base}: correlation {found.correlation:.3f}, usually above 0.95"
        findings.append(Finding("warn", "far", message, "check base and delta", found.correlation, 0.95))
    if found.flipped > 0.01:
        message = f"the delta changes the sign of {found.flipped:.1%} of the norm weights of {base}, usually of none"
        findings.append(Finding("warn", "norms", message, "check base and delta", found.flipped, 0.01))
    return findings
