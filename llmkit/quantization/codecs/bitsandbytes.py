"""bitsandbytes: blocks of 4 bits that stand for the values of a table (NF4, FP4), and rows of int8 (LLM.int8).

    weight                                  bytes of two codes, the first in the high bits, of all rows one after the
                                            other; in one column, and of any dtype (bnb_4bit_quant_storage)
    weight.absmax                           float32 [blocks], or uint8 where it is quantized itself ("nested")
    weight.quant_map                        float32 [16], the table
    weight.nested_absmax, .nested_quant_map float32 [blocks of absmax], [256]
    weight.quant_state.bitsandbytes__nf4    a JSON object as uint8: blocksize, shape, nested_offset, ...

    weight                                  int8 [out, in]
    SCB                                     float32 [out], the largest absolute value of each row
    weight_format                           0: rows as they are; other numbers are tiles of a GPU

Source: bitsandbytes/functional.py and backends/default/ops.py of bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import RequirementError, SpecError
from llmkit.formats.json_text import parse_object
from llmkit.quantization.codec import REMEDY, FolderReader, Specs, Stored, about, need, small
from llmkit.quantization.matrix import Decoded, Grid, QuantizedMatrix, Rearranged, Restorable
from llmkit.quantization.points import FP4, NF4, Points
from llmkit.quantization.words import cut, unsigned
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import viewed
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["CODEC", "BitsAndBytes"]

_STATE = "quant_state.bitsandbytes__"
_TYPES = {points.name: points for points in (NF4, FP4)}
_ENDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + kind for kind in _TYPES))
_DTYPES = {dtype.torch_name: dtype for dtype in (DType.F32, DType.F16, DType.BF16)}
_STEP = 7.874015718698502e-3  # 1 / 127, as the library has it


class BitsAndBytes(FolderReader):
    """4 bits on a table, and int8."""

    name = "bitsandbytes"

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        for kind in _TYPES:
            found = [name for name in specs if name.endswith(_STATE + kind)]
            if found:
                return kind, found
        blocks = [name for name in specs if name.endswith(".absmax")]
        if blocks:
            return "4 bits", blocks
        rows = [name for name in specs if name.endswith(".SCB")]
        return ("int8", rows) if rows else None

    def matrices(self, stored: Stored) -> tuple[Mapping[str, Restorable], set[str]]:
        found: dict[str, Restorable] = {}
        used: set[str] = set()
        for name in stored.tensors:
            weight, _, end = name.rpartition(".")
            if end not in ("absmax", "SCB"):
                continue
            weight = weight if end == "absmax" else f"{weight}.weight"
            parts = stored.parts(weight, _ENDS) if end == "absmax" else {"SCB": stored.tensors[name]}
            used |= {weight, *(f"{weight}.{part}" for part in parts), name}
            with about(weight):
                parts["weight"] = need(stored.tensors, weight)
                if end == "absmax":
                    found[weight] = _blocks(parts)
                    continue
                form = f"{weight}_format"
                if form in stored.tensors:
                    used.add(form)
                    _refuse_tiles(stored.tensors[form])
                found[weight] = _rows(parts["weight"], parts["SCB"])
        return found, used


def _blocks(parts: Mapping[str, Lazy]) -> Restorable:
    """A weight of 4 bits."""
    state = _state(parts)
    shape, size = state.shape, state.block_size
    numel, n_blocks = math.prod(shape), -(-math.prod(shape) // size)
    stored = parts["weight"]
    if stored.spec.nbytes != (numel + 1) // 2:
        raise SpecError(f"it is {stored.spec}; expected {(numel + 1) // 2} bytes for {list(shape)}", hint=REMEDY)
    table = struct.unpack("<16f", small(need(parts, "quant_map", TensorSpec(DType.F32, (16,)))))
    if not all(map(math.isfinite, table)):
        raise SpecError("quant_map holds NaN or infinities", hint=REMEDY)
    points = next((known for known in _TYPES.values() if known.values == table), Points(state.kind, 4, table))
    # Blocks follow each other through all rows: where they do not fall on the rows, all is one long row.
    n_out, n_in = shape[0], math.prod(shape[1:])
    is_even = n_in % size == 0 and n_in % 2 == 0
    rows, columns = (n_out, n_in) if is_even else (1, numel)
    scales = _scales(parts, state, TensorSpec(DType.F32, (rows, n_blocks // rows)))
    codes = Apply(
        "swap", [viewed(stored, DType.U8, (rows, (columns + 1) // 2))],
        TensorSpec(DType.U8, (rows, (columns + 1) // 2)), lambda pairs: (pairs << 4) | (pairs >> 4),
    ).output()  # fmt: skip
    matrix = QuantizedMatrix(
        Grid(4, size, points=points),
        (rows, columns),
        codes,
        scales,
        source=f"{state.kind} block {size}",
        dtype=state.dtype,
    )
    return matrix if matrix.shape == shape else Rearranged(matrix, lambda weight: viewed(weight, weight.dtype, shape))


def _scales(parts: Mapping[str, Lazy], state: _State, spec: TensorSpec) -> Lazy:
    """The largest absolute value of each block, float32 [rows, blocks in a row]."""
    n = spec.numel
    if "nested_absmax" not in parts:
        return viewed(need(parts, "absmax", TensorSpec(DType.F32, (n,))), DType.F32, spec.shape)
    size, offset = state.nested_block_size, state.nested_offset
    inputs = [
        need(parts, "absmax", TensorSpec(DType.U8, (n,))),
        need(parts, "nested_absmax", TensorSpec(DType.F32, (-(-n // size),))),
        need(parts, "nested_quant_map", TensorSpec(DType.F32, (256,))),
    ]

    def fn(codes: torch.Tensor, largest: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        values = table[codes.int()] * largest.repeat_interleave(size)[:n]
        return (values + offset).view(spec.shape)

    attrs = {"block_size": size, "offset": offset}
    # Their blocks cross the rows, too: computed whole, and cut.
    return cut(Apply("nested scales", inputs, spec, fn, attrs, row_step=None).output())


@dataclass(frozen=True)
class _State:
    """What the JSON object says of a weight."""

    kind: str
    shape: tuple[int, ...]
    block_size: int
    nested_block_size: int
    nested_offset: float
    dtype: DType | None


def _state(parts: Mapping[str, Lazy]) -> _State:
    """The quant_state of a weight.

    Raises:
        InputError, SpecError: it is missing, or is none.
    """
    ends = [end for end in parts if end.startswith(_STATE)]
    if len(ends) != 1:
        raise SpecError(f"it has {len(ends)} tensors {_STATE}nf4 or fp4; expected one", hint=REMEDY)
    entry = parse_object(small(parts[ends[0]]), ends[0])

    def positive(key: str) -> int:
        value = entry.get(key)
        if type(value) is not int or not 0 < value <= 2**20:
            raise SpecError(f"{ends[0]}: {key} is {str(value)[:60]!r}, which is no size of a block", hint=REMEDY)
        return value

    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or any(type(n) is not int or not 0 < n < 2**40 for n in shape):
        raise SpecError(f"{ends[0]}: shape is {str(shape)[:60]!r}; expected numbers of rows and columns", hint=REMEDY)
    offset = entry.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise SpecError(f"{ends[0]}: nested_offset is {str(offset)[:60]!r}; expected a number", hint=REMEDY)
    nested = positive("nested_blocksize") if "nested_absmax" in parts else 0
    return _State(
        ends[0].removeprefix(_STATE),
        tuple(shape),
        positive("blocksize"),
        nested,
        float(offset),
        _DTYPES.get(str(entry.get("dtype"))),
    )


def _refuse_tiles(form: Lazy) -> None:
    if any(small(form)):
        raise RequirementError("its int8 lies in tiles of a GPU (weight_format), which are not read", hint=REMEDY)


def _rows(values: Lazy, largest: Lazy) -> Restorable:
    if values.dtype is not DType.I8 or len(values.shape) != 2:
        raise SpecError(f"it is {values.spec}; expected int8 [out, in]", hint=REMEDY)
    need({"SCB": largest}, "SCB", TensorSpec(DType.F32, values.shape[:1]))
    return _Rows(values, largest)


@dataclass(frozen=True, eq=False)
class _Rows:
    """int8 [out, in] and the largest absolute value of each row, float32 [out]."""

    values: Lazy
    largest: Lazy

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """The float weight: (value * largest) * (1 / 127), rounded in this order, as the library does."""
        n_out, n_in = self.values.shape
        wanted = dtype or DType.F32

        def fn(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
            return (values * largest.view(-1, 1)).mul_(_STEP).to(wanted.torch)

        spec = TensorSpec(wanted, (n_out, n_in))
        node = Decoded("dequantize", [self.values, self.largest], spec, fn, {"bits": 8}, scratch=1.0)
        column = TensorSpec(DType.F32, (n_out, 1))
        scales = Apply("scales", [self.largest], column, lambda x: x.view(-1, 1) * _STEP).output()
        node.matrix = QuantizedMatrix(Grid(8), (n_out, n_in), unsigned(self.values, 8), scales)
        node.source = "int8"
        return node.output()


CODEC = BitsAndBytes()
