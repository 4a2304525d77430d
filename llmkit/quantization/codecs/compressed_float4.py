"""Float4 (e2m1) in compressed-tensors' layout: NVFP4 and MXFP4.

    weight_packed        uint8 [out, in / 2], two values in a byte, the first in the low bits
    weight_scale         nvfp4-pack-quantized: float8 e4m3 [out, in / 16], divided by weight_global_scale, float32 [1]
                         mxfp4-pack-quantized: uint8 [out, in / 32], the exponent of a power of two plus 127
    input_global_scale   float32 [1], where inputs are to be rounded to float4, too; they stay floats here

The library restores weights in bfloat16, whatever the model's dtype is.
Source: compressed_tensors/compressors/nvfp4 and mxfp4 of vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.errors import RequirementError, SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import REMEDY, required
from llmkit.quantization.float8 import powers_of_two
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.points import MXFP4
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec

# And the columns that share a scale.
FLOAT4_FORMATS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}


@dataclass(frozen=True, eq=False)
class Float4:
    """A weight of float4 values; restored in bfloat16, and cast from that."""

    matrix: QuantizedMatrix

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """As of `Restorable`."""
        weight = self.matrix.dequantized(DType.BF16)
        return weight if dtype in (None, DType.BF16) else weight.cast(dtype)


def read_float4(parts: Mapping[str, Lazy], settings: Mapping[str, Any]) -> Float4:
    """The weight of a module, by the ends of the names of its tensors.

    Args:
        settings: the config group of the module; its `format` is one of `FLOAT4_FORMATS`.

    Raises:
        RequirementError: it has zero points.
        SpecError: tensors are missing, or do not fit together.
    """
    form, weights = settings["format"], settings.get("weights")
    if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 4):
        raise SpecError(f"{form}: weights are {str(weights)[:60]!r}; expected float, 4 bits", hint=REMEDY)
    if not weights.get("symmetric", True):
        raise RequirementError(f"{form} with zero points is not read", hint=REMEDY)
    stored, size = required(parts, "weight_packed"), FLOAT4_FORMATS[form]
    if stored.dtype is not DType.U8 or len(stored.shape) != 2 or stored.shape[1] * 2 % size:
        raise SpecError(
            f"weight_packed is {stored.spec}; expected U8[out, in / 2], in a multiple of {size}", hint=REMEDY
        )
    if weights.get("group_size") not in (None, size):
        raise SpecError(f"{form} in groups of {str(weights['group_size'])[:20]}; expected {size}", hint=REMEDY)
    n_out, n_in = stored.shape[0], stored.shape[1] * 2
    scales = _ratios(parts, (n_out, n_in // size)) if size == 16 else _powers(parts, (n_out, n_in // size))
    name = form.partition("-")[0].upper()
    return Float4(QuantizedMatrix(Grid(4, size, points=MXFP4), (n_out, n_in), stored, scales, source=name))


def _ratios(parts: Mapping[str, Lazy], shape: tuple[int, int]) -> Lazy:
    """Scales of NVFP4, float32 [out, groups]."""
    scales = required(parts, "weight_scale", TensorSpec(DType.F8_E4M3, shape))
    of_all = required(parts, "weight_global_scale", TensorSpec(DType.F32, (1,)))

    def fn(scales: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        return scales.float() / divisor

    return Apply("divide", [scales, of_all], TensorSpec(DType.F32, shape), fn, input_rows=[1, 0]).output()


def _powers(parts: Mapping[str, Lazy], shape: tuple[int, int]) -> Lazy:
    """Scales of MXFP4, float32 [out, groups]."""
    exponents = required(parts, "weight_scale", TensorSpec(DType.U8, shape), TensorSpec(DType.F8_E8M0, shape))
    return powers_of_two(exponents, shape)
