"""How one tensor of a delta, or of the model it gives, is computed: a sum in a fixed dtype, new rows, or ulps.

The float functions repeat the published scripts bit for bit: cast both sides to the arithmetic's dtype, one rounded
sum, one cast. The ulp functions are llmkit's own: the bit patterns of a float type, read as sign and magnitude, are
integers in the order of the values, and their difference (modulo the word) gives the tuned weights back exactly.
"""

from __future__ import annotations

from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.rearrange import zeros
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.delta.profiles import NewRows

# Columns of a mean computed together: a multiple of every vector width, so the order of the sums, and with it the
# bits, are those of the whole matrix, in a fraction of the memory.
_MEAN_COLUMNS = 512


def combined(sign: int, left: Lazy, right: Lazy, arithmetic: DType, output: DType) -> Lazy:
    """`left + sign * right` of one shape [n, …], each cast to `arithmetic` first, the sum cast to `output`."""

    def compute(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = x.to(arithmetic.torch), y.to(arithmetic.torch)
        if a is x:  # the operand may be shared: a new tensor
            return (a + b if sign > 0 else a - b).to(output.torch)
        return (a.add_(b) if sign > 0 else a.sub_(b)).to(output.torch)

    n_casts = sum(lazy.dtype is not arithmetic for lazy in (left, right)) + (output is not arithmetic)
    attrs = {"in": arithmetic.torch_name}
    spec = left.spec.with_dtype(output)
    return Apply("add" if sign > 0 else "subtract", [left, right], spec, compute, attrs, scratch=n_casts).output()


def overlapped(sign: int, base: Lazy, delta: Lazy, arithmetic: DType, output: DType) -> Lazy:
    """[n, …] of the delta's shape: `delta + sign * base` in the leading block of the base's shape, else `delta`.

    `base.shape <= delta.shape` in every dimension; dtypes as in `combined`.
    """
    if base.shape == delta.shape:
        return combined(sign, delta, base, arithmetic, output)
    n_rows = base.spec.n_rows
    top = TakeRows(delta, 0, n_rows).output() if n_rows < delta.spec.n_rows else delta
    if base.shape[1:] == delta.shape[1:]:
        head = combined(sign, top, base, arithmetic, output)
    else:
        block = tuple(slice(n) for n in base.shape[1:])

        def compute(d: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            total = d.to(arithmetic.torch, copy=True)
            total[(slice(None), *block)].add_(b.to(arithmetic.torch), alpha=sign)
            return total.to(output.torch)

        spec = top.spec.with_dtype(output)
        attrs = {"in": arithmetic.torch_name, "sign": sign}
        head = Apply("overlap", [top, base], spec, compute, attrs, scratch=3).output()
    if n_rows == delta.spec.n_rows:
        return head
    tail = TakeRows(delta, n_rows, delta.spec.n_rows).output()
    return Concat([head, tail.cast(output)]).output()


def extended(base: Lazy, n_rows: int, new_rows: NewRows, dtype: DType) -> Lazy:
    """[n, …] -> [n_rows, …] in `dtype`: rows appended, zeros or the mean of the rows of `base`, or cut off."""
    n_new = n_rows - base.spec.n_rows
    if n_new <= 0:
        return base if n_new == 0 else TakeRows(base, 0, n_rows).output()
    spec = TensorSpec(dtype, (n_new, *base.shape[1:]))
    added = _mean_rows(base, spec) if new_rows is NewRows.MEAN else zeros(spec)
    return Concat([base.cast(dtype), added]).output()


def _mean_rows(base: Lazy, spec: TensorSpec) -> Lazy:
    def compute(weight: torch.Tensor) -> torch.Tensor:
        flat = weight.reshape(weight.shape[0], -1)
        starts = range(0, flat.shape[1], _MEAN_COLUMNS)
        mean = torch.cat([flat[:, i : i + _MEAN_COLUMNS].to(spec.dtype.torch).mean(dim=0) for i in starts])
        return mean.reshape(1, *spec.shape[1:]).expand(spec.shape).contiguous()

    width = base.shape[1] if len(base.shape) > 1 else 1
    scratch = min(1.0, 2 * _MEAN_COLUMNS / width)
    return Apply(
        "mean_rows", [base], spec, compute, {"over": base.spec.n_rows}, row_step=None, scratch=scratch
    ).output()


_ULP = {8: DType.I8, 16: DType.I16, 32: DType.I32, 64: DType.I64}


def ulp_dtype(dtype: DType) -> DType:
    """The integer type that counts ulps of `dtype`."""
    return _ULP[dtype.bits]


def ordinal(bits: torch.Tensor) -> torch.Tensor:
    """Bit patterns of floats, signed integers [...], to integers in the order of the values; its own inverse.

    Neighbouring floats differ by one; -0.0 is -1, +0.0 is 0; infinities and NaNs lie beyond the largest values.
    """
    width = bits.element_size() * 8
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _ordinals(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    return ordinal(data.to(dtype.torch).view(ulp_dtype(dtype).torch))


def ulp_subtracted(tuned: Lazy, base: Lazy) -> Lazy:
    """`tuned - base` in ulps, both of one shape, `base` cast to the dtype of `tuned`: integers of that width."""
    dtype = tuned.dtype

    def compute(b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return _ordinals(t, dtype).sub_(_ordinals(b, dtype))

    attrs = {"of": dtype.torch_name}
    spec = tuned.spec.with_dtype(ulp_dtype(dtype))
    return Apply("ulp_subtract", [base, tuned], spec, compute, attrs, scratch=2).output()


def ulp_added(base: Lazy, delta: Lazy, dtype: DType) -> Lazy:
    """`base` (cast to the float `dtype`) plus `delta` ulps, of one shape: the exact inverse of `ulp_subtracted`."""

    def compute(b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return ordinal(_ordinals(b, dtype).add_(d)).view(dtype.torch)

    attrs = {"of": dtype.torch_name}
    return Apply("ulp_add", [base, delta], delta.spec.with_dtype(dtype), compute, attrs, scratch=2).output()
