"""HQQ: groups with a scale and a zero point that lies between two codes, packed along the first dimension.

    W_q         the codes of [groups, size] (axis 1) or [size, groups] (axis 0), which are the rows of the weight one
                after the other, cut anew. Some rows share a byte (or an int32: ten of 3 bits), the first in the highest
                bits: of 4 bits those of the first half with those of the second. Any dtype, where `view_as_float`
    scale, zero floats [groups, 1] or [1, groups]; a weight is (code - zero) * scale
    shape, group_size, axis, packing        numbers, and the text `4bit_u8`, as tensors
    compute_dtype, unpack_view_dtype, ...   what the library evaluates as Python, and is not looked at here

`qmodel.pt`, a pickle of `save_quantized`, has the same for each module, with numbers and texts as they are.

Source: hqq/core/quantize.py and bitpack.py of mobiusml/hqq.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.errors import RequirementError, SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import REMEDY, FolderReader, Specs, StoredFolder, error_context, required, small
from llmkit.quantization.matrix import Grid, QuantizedMatrix, Rearranged, Restorable
from llmkit.quantization.packing import n_bytes, pack
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import sliceable, view_as
from llmkit.tensors.spec import DType, TensorSpec

_CODES = "W_q"
_SUFFIXES = (
    "W_q", "scale", "zero", "shape", "group_size", "axis", "packing", "nbits", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
# `packing` -> bits of a code, rows that share a word, and the word.
_PACKINGS = {
    "8bit_u8": (8, 1, DType.U8), "4bit_u8": (4, 2, DType.U8), "3bit_32": (3, 10, DType.I32),
    "2bit_u8": (2, 4, DType.U8), "1bit_u8": (1, 8, DType.U8),
}  # fmt: skip
_INTEGERS = {DType.I64: "q", DType.I32: "i", DType.U8: "B"}


class HalfQuadratic(FolderReader):
    """Read, not written."""

    name = "hqq"

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        names = [name for name in specs if name.endswith(f".{_CODES}")]
        return ("", names) if names else None

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        matrices: dict[str, Restorable] = {}
        used: set[str] = set()
        for name in stored.tensors:
            if name.endswith(f".{_CODES}"):
                module = name.removesuffix(f".{_CODES}")
                with error_context(module):
                    parts = stored.parts(module, _SUFFIXES)
                    matrices[f"{module}.weight"] = _weight(parts)
                used |= {f"{module}.{end}" for end in parts}
        return matrices, used


def _weight(parts: Mapping[str, Lazy]) -> Restorable:
    """The weight of a module.

    Raises:
        RequirementError: it is packed in a way that is not read.
        SpecError: parts are missing, or do not fit together.
    """
    packing = small(required(parts, "packing")).decode("ascii", "replace")
    if packing not in _PACKINGS:
        raise RequirementError(f"packing {packing[:40]!r} is not read; expected {', '.join(_PACKINGS)}", hint=REMEDY)
    bits, per_word, word = _PACKINGS[packing]
    n_out, n_in = shape = _integers(parts, "shape", 2)
    (size,), (axis,) = _integers(parts, "group_size", 1), _integers(parts, "axis", 1)
    if min(shape) < 1 or max(shape) >= 2**40 or size < 1 or axis not in (0, 1):
        raise SpecError(f"shape {list(shape)}, group_size {size}, axis {axis} are no weight's", hint=REMEDY)
    n_groups = n_out * n_in // size
    if n_groups * size != n_out * n_in:
        raise SpecError(f"groups of {size} do not divide {n_out} x {n_in} weights", hint=REMEDY)
    n_rows, n_columns = (n_groups, size) if axis == 1 else (size, n_groups)
    words = view_as(required(parts, _CODES), word, (-(-n_rows // per_word), n_columns))
    # One group a row, where groups are not of neighbours in a row of the weight.
    is_plain = axis == 1 and n_in % size == 0
    rows, columns = (n_out, n_in) if is_plain else (n_groups, size)

    def codes_of(words: torch.Tensor) -> torch.Tensor:
        shifts = range(bits * (per_word - 1), -1, -bits)
        codes = torch.cat([((words >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in shifts])[:n_rows]
        ordered = codes if axis == 1 else codes.t()
        return pack(ordered.reshape(rows, columns), bits)

    spec = TensorSpec(DType.U8, (rows, n_bytes(columns, bits)))
    attrs = {"packing": packing, "axis": axis, "group_size": size}
    # Rows that share a word lie far from each other: all are unpacked at once, and cut.
    codes = sliceable(Apply("codes", [words], spec, codes_of, attrs, row_step=None, scratch=1.0).output())
    scales, zeros = (_of_groups(parts, key, (n_groups, 1)[:: 1 if axis else -1]) for key in ("scale", "zero"))
    per_row = (rows, n_groups // rows)
    scales, zeros = view_as(scales, scales.dtype, per_row), view_as(zeros, zeros.dtype, per_row)
    matrix = QuantizedMatrix(Grid(bits, size, is_symmetric=False), (rows, columns), codes, scales, zeros)
    return matrix if is_plain else Rearranged(matrix, lambda groups: _joined(groups, axis, shape))


def _joined(groups: Lazy, axis: int, shape: Sequence[int]) -> Lazy:
    """The weight of its groups [groups, size]; computed whole, and cut."""
    n_out, n_in = shape
    spec = TensorSpec(groups.dtype, (n_out, n_in))

    def fn(weight: torch.Tensor) -> torch.Tensor:
        return (weight if axis == 1 else weight.t()).reshape(n_out, n_in)

    return sliceable(Apply("join groups", [groups], spec, fn, {"axis": axis}, row_step=None).output())


def _integers(parts: Mapping[str, Lazy], key: str, n: int) -> tuple[int, ...]:
    """The `n` integers that a part holds."""
    stored = required(parts, key)
    if stored.dtype not in _INTEGERS or stored.spec.numel != n:
        raise SpecError(f"{key} is {stored.spec}; expected {n} integers", hint=REMEDY)
    return struct.unpack(f"<{n}{_INTEGERS[stored.dtype]}", small(stored))


def _of_groups(parts: Mapping[str, Lazy], key: str, shape: Sequence[int]) -> Lazy:
    """A float for each group."""
    floats = (DType.F16, DType.BF16, DType.F32)
    return required(parts, key, *(TensorSpec(dtype, (shape[0], shape[1])) for dtype in floats))


CODEC = HalfQuadratic()
