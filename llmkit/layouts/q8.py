"""llama2.c's int8: groups of a matrix's elements in row-major order, each with a scale of max/127."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.tensors.finite import require_finite
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["dequantized", "group_size_for", "quantized"]

_GROUP_SIZE = 64


def group_size_for(dim: int) -> int:
    """64, halved until it divides `dim`."""
    size = _GROUP_SIZE
    while dim % size:
        size //= 2
    return size


def dequantized(values: Lazy, source: SourceFile, offset: int, scales: TensorSpec) -> Lazy:
    """The float32 matrix of stored int8 values and the scales at `offset`."""
    n_rows, n_columns = values.shape
    per_row, is_whole = divmod(scales.numel, n_rows)
    shape = (n_rows, per_row) if not is_whole else (scales.numel,)  # groups that cross rows: only as a whole
    node = values.node
    name = node.name if isinstance(node, Read) else ""
    stored = Read(f"{name}/scale", TensorSpec(DType.F32, shape), source, offset).output()

    def fn(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (q.float().view(scale.numel(), -1) * scale.view(-1, 1)).view(q.shape)

    spec = TensorSpec(DType.F32, (n_rows, n_columns))
    inputs_per_row = [1, 1] if not is_whole else [1, 0]
    return Apply(
        "dequantize", [values, stored], spec, fn, {"groups": scales.numel}, row_step=None if is_whole else 1,
        input_rows=inputs_per_row, scratch=2.0,
    ).output()  # fmt: skip


def quantized(weight: Lazy, group_size: int, name: str) -> tuple[Lazy, Lazy]:
    """The int8 values [rows, columns] and the float32 scales (one a group) of a matrix.

    Evaluated, they raise InputError where it holds NaN or infinities; `name` is the matrix's.
    """
    n_rows, n_columns = weight.shape
    is_whole = n_columns % group_size != 0
    n_groups = weight.spec.numel // group_size
    scale_shape = (n_groups,) if is_whole else (n_rows, n_columns // group_size)

    def fn(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        groups = w.float().reshape(-1, group_size)
        scale = groups.abs().amax(1) / 127.0
        require_finite(groups, scale, name=name)
        divisor = torch.where(scale > 0, scale, 1.0)  # a group of zeros stays zero
        q = torch.round(groups / divisor[:, None]).to(torch.int8)
        shape = (scale.numel(),) if is_whole else (len(w), -1)
        return q.view(w.shape), scale.view(shape)

    specs = [TensorSpec(DType.I8, weight.shape), TensorSpec(DType.F32, scale_shape)]
    node = Apply(
        "q8", [weight], specs, fn, {"group": group_size}, row_step=None if is_whole else 1,
        input_rows=[0 if is_whole else 1], output_rows=[0, 0] if is_whole else [1, 1], scratch=3.0,
    )  # fmt: skip
    values, scale = node.outputs()
    return values, scale
