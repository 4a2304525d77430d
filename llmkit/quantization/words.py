"""Codes of quantized matrices in the forms that layouts store: int32 words, or signed bytes; all lazy."""

from __future__ import annotations

from array import array
from functools import cache

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import small
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.quantization.packing import n_bytes, n_words, pack, pack_words, unpack, unpack_words, width
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import take_columns, view_as
from llmkit.tensors.siblings import without_siblings
from llmkit.tensors.spec import DType, TensorSpec


def words_of(matrix: QuantizedMatrix) -> Lazy:
    """Codes [out, in] as int32 words [out, n_words(in)]; the same bytes where `packing` has codes of as many bits."""
    (n_out, n_in), bits = matrix.shape, matrix.bits
    spec = TensorSpec(DType.I32, (n_out, n_words(n_in, bits)))
    if bits == width(bits) and matrix.codes.spec.row_nbytes == spec.row_nbytes:
        return view_as(matrix.codes, spec.dtype, spec.shape)

    def fn(codes: torch.Tensor) -> torch.Tensor:
        return pack_words(unpack(codes, bits, n_in), bits)

    return Apply("words", [matrix.codes], spec, fn, {"bits": bits}, scratch=8.0).output()


def codes_of(words: Lazy, bits: int, n_in: int) -> Lazy:
    """Int32 words [out, n] as codes, uint8 [out, n_bytes(in)]; the inverse of `words_of`."""
    n_out = words.spec.n_rows
    if bits == width(bits):
        return take_columns(view_as(words, DType.U8, (n_out, 4 * words.shape[1])), 0, n_bytes(n_in, bits))

    def fn(stored: torch.Tensor) -> torch.Tensor:
        return pack(unpack_words(stored, bits, n_in), bits)

    return Apply("codes", [words], TensorSpec(DType.U8, (n_out, n_bytes(n_in, bits))), fn, {"bits": bits}).output()


def from_signed(stored: Lazy, bits: int, *, are_packed: bool = True) -> Lazy:
    """Numbers in two's complement, 8-bit [rows, n], as codes, uint8 [rows, n_bytes(n)] (unpacked: [rows, n])."""

    def fn(q: torch.Tensor) -> torch.Tensor:
        codes = (q.view(torch.uint8) + (1 << (bits - 1))) & ((1 << bits) - 1)
        return pack(codes, bits) if are_packed else codes

    n_out, n = stored.shape
    spec = TensorSpec(DType.U8, (n_out, n_bytes(n, bits) if are_packed else n))
    return Apply("offset", [stored], spec, fn, {"bits": bits}).output()


def to_signed(codes: Lazy) -> Lazy:
    """Codes of 8 bits, uint8 [rows, n], less the middle code 128: int8 [rows, n]."""

    def fn(q: torch.Tensor) -> torch.Tensor:
        return (q ^ 0x80).view(torch.int8)

    return Apply("signed", [codes], codes.spec.with_dtype(DType.I8), fn).output()


def zero_points(matrix: QuantizedMatrix) -> Lazy:
    """Zero points of all groups, uint8 [out, groups]; those of a symmetric grid are its middle code."""
    if matrix.zeros is not None:
        return matrix.zeros
    spec, middle = TensorSpec(DType.U8, (matrix.shape[0], matrix.n_groups)), matrix.grid.middle

    def fn(scales: torch.Tensor) -> torch.Tensor:
        return torch.full(scales.shape, middle, dtype=torch.uint8)

    return Apply("zero points", [matrix.scales], spec, fn, {"middle": middle}).output()


def group_order(stored: Lazy, n_columns: int, n_groups: int, group: int) -> Lazy | None:
    """The group of each input column (`g_idx`), int32 [in]; None if groups are runs of neighbouring columns.

    A stored one is read now: 4 bytes a column.

    Raises:
        SpecError: another dtype or length, a number that is no group, or one alone where there are several groups
            (zeros that nothing was written over).
    """
    if stored.spec != TensorSpec(DType.I32, (n_columns,)):
        raise SpecError(f"g_idx is {stored.spec}; expected int32 [{n_columns}]")
    source = without_siblings(stored)
    if source is not stored and source.node.inputs:
        return stored  # it is still to be computed, with the codes
    groups = small(stored, max_nbytes=stored.spec.nbytes)
    if groups == _neighbours(n_columns, group):
        return None
    numbers = memoryview(groups).cast("i")
    if not 0 <= min(numbers) <= max(numbers) < n_groups:
        raise SpecError(f"g_idx has groups {min(numbers)} to {max(numbers)}; expected 0 to {n_groups - 1}")
    if n_groups > 1 and min(numbers) == max(numbers):
        raise SpecError(
            f"g_idx puts all {n_columns} columns into group {numbers[0]} of {n_groups}",
            hint="without its g_idx tensors the file is read with groups of neighbouring columns, which they are where "
            "desc_act is false",
        )
    return stored


@cache
def _neighbours(n_columns: int, group: int) -> bytes:
    return array("i", (i // group for i in range(n_columns))).tobytes()
