"""Tensors of GGUF files as lazy ones: blocks read and dequantized row by row, and floats quantized into blocks.

The arithmetic is `gguf.quants`, so that the bits are those of the gguf library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.errors import RequirementError
from llmkit.formats.gguf_codes import block_codes
from llmkit.formats.gguf_header import GgufFile, GgufTensor
from llmkit.formats.gguf_types import TYPE_BY_NAME, GgufType
from llmkit.tensors.codes import Decoded
from llmkit.tensors.finite import require_finite
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["DEQUANTIZE", "QUANTIZE", "quantized", "stored_tensor"]

DEQUANTIZE, QUANTIZE = "dequantize blocks", "quantize blocks"


def stored_tensor(file: GgufFile, tensor: GgufTensor) -> Lazy:
    """The tensor as floats: plain types as they are, blocks as float32.

    Raises:
        RequirementError: a type that nothing here dequantizes.
    """
    kind, shape = tensor.type, tensor.shape
    if kind.dtype is not None:
        return Read(tensor.name, TensorSpec(kind.dtype, shape), file.source, tensor.offset).output()
    if not kind.is_known:
        raise RequirementError(
            f"{file.source.path}: {tensor.name} is {kind.name}, which is not dequantized",
            hint="take a file of another quantization",
        )
    # A row of the raw bytes for each row of the tensor; a vector is one row.
    rows = shape[0] if len(shape) > 1 else 1
    raw = TensorSpec(DType.U8, (rows, tensor.nbytes // rows))
    read = Read(tensor.name, raw, file.source, tensor.offset).output()
    step = 1 if len(shape) > 1 else None
    spec = TensorSpec(DType.F32, shape)
    node = Decoded(DEQUANTIZE, [read], spec, _dequantize(kind, shape), {"type": kind.name}, row_step=step)
    node.source = kind.name
    if len(shape) == 2:
        node.codes = block_codes(read, kind, shape[1])
    return node.output()


def _dequantize(kind: GgufType, shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def fn(raw: torch.Tensor) -> torch.Tensor:
        values = _call("dequantize", raw.view(-1, kind.row_nbytes(shape[-1])), kind)
        return values.view(-1, *shape[1:]) if len(shape) > 1 else values.view(shape)

    return fn


def quantized(lazy: Lazy, kind_name: str, name: str) -> Lazy:
    """A matrix as the bytes of its rows in blocks of type `kind_name`, which the row length is a multiple of.

    Evaluated, it raises InputError where a block's scale is not finite; `name` is the matrix's.
    """
    kind = TYPE_BY_NAME[kind_name]
    n_halves = 2 if kind_name.endswith("_1") else 1  # the scale, and the minimum
    spec = TensorSpec(DType.U8, (*lazy.shape[:-1], kind.row_nbytes(lazy.shape[-1])))

    def fn(x: torch.Tensor) -> torch.Tensor:
        import torch

        made = _call("quantize", x.float(), kind)
        halves = made.view(-1, kind.nbytes)[:, : 2 * n_halves].contiguous().view(torch.float16)
        require_finite(x, halves, name=name)
        return made

    return Apply(QUANTIZE, [lazy], spec, fn, {"type": kind_name}, scratch=4.0).output()


def _call(name: str, x: torch.Tensor, kind: GgufType) -> torch.Tensor:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # damaged scales become NaN, and large ones infinite: no reason for a warning
        return torch.from_numpy(getattr(quants, name)(x.numpy(), GGMLQuantizationType(kind.code)))
