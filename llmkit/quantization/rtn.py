"""Round to nearest: the grid of each group from its extremes, every weight to the nearest grid point.

    symmetric     scale = absmax / ((2^bits - 1) / 2)
    asymmetric    scale = (max - min) / (2^bits - 1),   zero = q_min - min / scale      (0 is always on the grid)
    q = round(clamp(w / scale + zero, q_min, q_max)),   w' = (q - zero) * scale

These are compressed-tensors' `calculate_qparams` and `quantize`, bit for bit, called on float32 weights with
`scale_dtype` set to the dtype in which scales are stored. Called on bfloat16 weights as they are, that library divides
in bfloat16, whose 8 significant bits round the quotient before it is rounded to the grid: at 8 bits the error is 5 to
9 % larger (Gaussian weights; at 4 bits, and in float16, under 0.3 %). Here half-precision weights are widened, which is
exact, and divided by the scale as it is stored, so the only rounding is the one to the grid.

Source: compressed_tensors/quantization/utils/helpers.py and quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.quantization.packing import n_words, pack, pack_into
from llmkit.quantization.schemes import Scheme
from llmkit.tensors.finite import require_finite

if TYPE_CHECKING:
    import torch

__all__ = ["Observe", "dequantize", "grid", "quantize_packed", "quantize_rows"]

# Receives (squared error, squared norm, rows) of what was just quantized.
Observe = Callable[[float, float, int], None]

# Float32 bytes handled at a time: every pass over a block finds it in the second-level cache.
_BLOCK_NBYTES = 2**20


def grid(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale of each group of float32 weights [out, groups, size], and its zero point.

    Returns:
        Scales in `scale_dtype`, never 0; zero points (int8) or None for a symmetric scheme; both [out, groups].

    Raises:
        InputError: a group holds NaN or an infinity, or reaches beyond the dtype of its scale.
    """
    import torch

    low = weight.amin(-1).clamp_(max=0)
    high = weight.amax(-1).clamp_(min=0)
    require_finite(weight, high - low)
    if scheme.is_symmetric:
        scale, zero = torch.maximum(-low, high) / ((scheme.q_max - scheme.q_min) / 2), None
    else:
        scale = (high - low) / (scheme.q_max - scheme.q_min)
        # A group of zeros gives 0/0; any zero point represents it, 0 is the plain choice.
        exact = (scheme.q_min - low / scale).nan_to_num_(nan=0.0)
        zero = exact.clamp_(scheme.q_min, scheme.q_max).round_().to(torch.int8)
    info = torch.finfo(scale_dtype)
    stored = scale.to(scale_dtype)
    require_finite(weight, stored * (scheme.q_max - scheme.q_min if zero is not None else -scheme.q_min))
    # All-zero groups, and scales too small for the stored dtype: any positive scale then rounds the group to zero.
    stored = stored.masked_fill_(stored == 0, info.eps)
    return stored, zero


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Weights in the dtype of the scales from grid points (int8) [out, groups, size].

    Computed in that dtype, as compressed-tensors does. q - zero has at most 8 significant bits, which even bfloat16
    holds, so the product is the only rounding.
    """
    values = q.to(scale.dtype)
    if zero is not None:
        values = values.sub_(zero.to(scale.dtype).unsqueeze(-1))
    return values.mul_(scale.unsqueeze(-1))


def quantize_packed(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, observe: Observe | None = None
) -> tuple[torch.Tensor, ...]:
    """`weight_packed`, `weight_scale` and, when asymmetric, `weight_zero_point` of a matrix [out, in].

    Rows may be quantized in any slices, as long as slices of an asymmetric scheme begin at multiples of 32 // bits
    (zero points of that many rows share a word). See `quantize_rows`.
    """
    packed, scales, zeros = quantize_rows(weight, scheme, scale_dtype, observe)
    return (packed, scales) if zeros is None else (packed, scales, pack(zeros, scheme.bits, dim=0))


def quantize_rows(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, observe: Observe | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Words of codes (see `packing`), scales [out, groups], and zero points (int8, [out, groups]) when asymmetric.

    Every row is computed from itself alone.

    Args:
        observe: called with the squared error of each block of rows, at no extra pass over memory.

    Raises:
        InputError: the weights hold NaN or infinities.
    """
    import torch

    n_out, n_in = weight.shape
    n_groups = scheme.n_groups(n_in)
    packed = torch.empty((n_out, n_words(n_in, scheme.bits)), dtype=torch.int32)
    scales = torch.empty((n_out, n_groups), dtype=scale_dtype)
    zeros = torch.empty((n_out, n_groups), dtype=torch.int8)
    n_rows = min(max(_BLOCK_NBYTES // (4 * max(n_in, 1)), 1), n_out)
    block = _Block(n_rows, n_in, n_groups, weight.dtype)
    for start in range(0, n_out, n_rows):
        rows = slice(start, min(start + n_rows, n_out))
        block.load(weight[rows])
        scale, zero = grid(block.weight, scheme, scale_dtype)
        block.round(scale, zero, scheme)
        scales[rows] = scale
        if zero is not None:
            zeros[rows] = zero
        if observe is not None:
            observe(*block.error(scale, zero), rows.stop - start)
        if n_in % scheme.per_word:
            packed[rows] = pack(block.q.flatten(1), scheme.bits)
        else:
            pack_into(packed[rows], block.q, scheme.bits)
    return packed, scales, None if scheme.is_symmetric else zeros


class _Block:
    """Rows at work: memory that is used again for every block (fresh pages would cost as much as the arithmetic)."""

    def __init__(self, n_rows: int, n_in: int, n_groups: int, dtype: torch.dtype) -> None:
        import torch

        shape = (n_rows, n_groups, n_in // n_groups)
        self._wide = None if dtype is torch.float32 else torch.empty(shape)
        self._steps = torch.empty(shape)
        self._q = torch.empty(shape, dtype=torch.int8)

    def load(self, rows: torch.Tensor) -> None:
        """Take rows [rows, in] as float32."""
        n = rows.shape[0]
        grouped = rows.reshape(n, *self._steps.shape[1:])
        self.weight = grouped if self._wide is None else self._wide[:n].copy_(grouped)
        self.steps, self.q = self._steps[:n], self._q[:n]

    def round(self, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> None:
        """Find the grid points `q` nearest to the weights."""
        import torch

        torch.div(self.weight, scale.float().unsqueeze(-1), out=self.steps)
        if zero is not None:
            self.steps.add_(zero.unsqueeze(-1))
        self.q.copy_(self.steps.clamp_(scheme.q_min, scheme.q_max).round_())

    def error(self, scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[float, float]:
        """Squared error of the weights as they will be read, and their squared norm."""
        import torch

        if zero is not None:
            self.steps.sub_(zero.unsqueeze(-1))
        restored = self.steps.mul_(scale.float().unsqueeze(-1))
        if scale.dtype is not torch.float32:
            restored = restored.to(scale.dtype).float()
        error, weight = restored.sub_(self.weight).view(-1), self.weight.reshape(-1)
        return float(torch.dot(error, error)), float(torch.dot(weight, weight))
