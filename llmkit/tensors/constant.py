"""A tensor that is there already, as a lazy one."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec


def constant(tensor: torch.Tensor) -> Lazy:
    """A tensor of any dtype and shape, to be put into expressions; its values are in no digest."""
    spec = TensorSpec(DType.of(tensor.dtype), tuple(tensor.shape))
    return Apply("constant", [], spec, lambda: tensor, row_step=None, output_rows=[0]).output()


def constant_of(values: Sequence[float], dtype: DType, shape: tuple[int, ...]) -> Lazy:
    """A few numbers as a tensor; made without torch, and part of the digest."""

    def fn() -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype.torch).view(shape)

    attrs = {"values": list(values)}
    return Apply("constant", [], TensorSpec(dtype, shape), fn, attrs, row_step=1, output_rows=[0]).output()
