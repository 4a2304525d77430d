"""The precision of matrix products in a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from llmkit.lazy_imports import torch
from llmkit.tensors.device import CPU, product_dtype


@contextmanager
def narrow_products() -> Iterator[None]:
    """Factors of float32 products are rounded to bfloat16, and summed up in float32, where the CPU is faster so.

    The inputs of layers and what is summed up of them then differ by 0.1 %, as they do from text to text. This holds
    for all threads: what else runs in the meantime should not need more of its products.
    """
    with _precision("medium" if product_dtype(CPU) is not None else "highest"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 products have float32 factors."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(name: Literal["medium", "highest"]) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
