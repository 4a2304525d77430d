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

Scales of 4 bits are written as they are (`bitsandbytes`), or quantized themselves (`bitsandbytes_nested`, the library's
double quantization). SCB is 127 times the scale: one that was read and is written again may change by its last bit.

Source: bitsandbytes/functional.py and backends/default/ops.py of bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from llmkit.errors import RequirementError, SpecError
from llmkit.formats.json_text import parse_object
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import (
    REMEDY,
    FolderCodec,
    Specs,
    StoredFolder,
    error_context,
    joined_experts,
    required,
    small,
)
from llmkit.quantization.codecs.nested_scales import NestedScales, nested_scales, parts_of_scales
from llmkit.quantization.matrix import Decoded, Grid, QuantizedMatrix, Rearranged, Restorable
from llmkit.quantization.points import FP4, NF4, Points
from llmkit.quantization.words import from_signed, to_signed
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import view_as
from llmkit.tensors.spec import DType, TensorSpec

_STATE = "quant_state.bitsandbytes__"
_TYPES = {points.name: points for points in (NF4, FP4)}
_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + kind for kind in _TYPES))
_DTYPES = {dtype.torch_name: dtype for dtype in (DType.F32, DType.F16, DType.BF16)}
_MOST_DIGITS = 24  # of the offset, in JSON
_STEP = 7.874015718698502e-3  # 1 / 127, as the library has it


class BitsAndBytes(FolderCodec):
    """NF4 and FP4 in blocks, and int8 with a scale for each row."""

    name = "bitsandbytes"
    bits: ClassVar[tuple[int, ...]] = (8,)
    group_sizes = ()
    points = (NF4, FP4)
    holds_zeros = False
    takes_conv1d = True
    is_nested: ClassVar[bool] = False

    def sizes_for(self, points: Points | None) -> tuple[int | Literal["channel"], ...]:
        return ("channel",) if points is None else (32, 64, 128, 256, 512, 1024, 2048, 4096)

    def refuses(self, matrix: QuantizedMatrix) -> str | None:
        points, n_in = matrix.grid.points, matrix.shape[1]
        why = super().refuses(matrix)
        if why is not None:
            return why
        if points is None:
            return None if matrix.group >= n_in else f"{self.name} has one scale a row for integers"
        if matrix.grid.group_size not in self.sizes_for(points):
            return f"{self.name} has no blocks of {matrix.group}"
        is_lossless = not self.is_nested or parts_of_scales(matrix.scales) is not None
        return None if is_lossless else f"{self.name} rounds scales to 8 bits"

    def prepared(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        if not self.is_nested or matrix.grid.points is None or parts_of_scales(matrix.scales) is not None:
            return matrix
        return replace(matrix, scales=nested_scales(matrix.scales))

    def as_described(self, entry: Mapping[str, Any]) -> FolderCodec:
        return NESTED if entry.get("bnb_4bit_use_double_quant") else CODEC

    def write(self, matrix: QuantizedMatrix) -> dict[str, Lazy]:
        (n_out, n_in), points, size = matrix.shape, matrix.grid.points, matrix.group
        if points is None:
            column = TensorSpec(DType.F32, (n_out,))
            largest = Apply("largest", [matrix.scales], column, lambda x: x.float().mul(127).view(-1)).output()
            return {"weight": to_signed(matrix.codes), "SCB": largest, "weight_format": constant_of([0], DType.U8, ())}
        parts = parts_of_scales(matrix.scales) if self.is_nested else None
        n_blocks = n_out * n_in // size
        entry = {
            "quant_type": points.name, "blocksize": size, "dtype": (matrix.dtype or DType.F32).torch_name,
            "shape": [n_out, n_in],
        }  # fmt: skip
        scales = {"absmax": view_as(matrix.scales.cast(DType.F32), DType.F32, (n_blocks,))}
        if parts is not None:
            scales = {"absmax": parts.codes, "nested_absmax": parts.largest, "nested_quant_map": parts.table}
            entry |= {"nested_blocksize": parts.size, "nested_dtype": "float32"}
        stored = {
            **scales,
            "quant_map": constant_of(points.values, DType.F32, (len(points.values),)),
            _STATE + points.name: _state_of(entry, parts.offset if parts is not None else None),
        }
        swapped = view_as(_swapped(matrix.codes), DType.U8, (n_out * n_in // 2, 1))
        return {"weight": swapped, **{f"weight.{end}": part for end, part in stored.items()}}

    def read(
        self, parts: Mapping[str, Lazy], settings: Mapping[str, Any], shape: tuple[int, int] | None
    ) -> QuantizedMatrix:
        by_name = {end.removeprefix("weight."): part for end, part in parts.items()}
        matrix = _rows(by_name["weight"], by_name["SCB"]).matrix if "SCB" in by_name else _blocks(by_name)
        if isinstance(matrix, QuantizedMatrix):
            return matrix
        raise RequirementError("its blocks cross the rows", hint=REMEDY)

    def describe(
        self,
        matrices: Mapping[str, QuantizedMatrix],
        ignore: Sequence[str],
        *,
        are_all: bool,
        experts: Collection[str] = (),
    ) -> dict[str, Any]:
        first = next(iter(matrices.values()))
        points, dtype = first.grid.points, (first.dtype or DType.F32).torch_name
        if len({matrix.bits for matrix in matrices.values()}) > 1:
            raise RequirementError(
                f"{self.name} has 4 or 8 bits in all layers of a folder, not both", hint="--format compressed-tensors"
            )
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": points is not None,
            "load_in_8bit": points is None,
            "bnb_4bit_quant_type": points.name if points is not None else NF4.name,
            "bnb_4bit_use_double_quant": self.is_nested,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(ignore),  # null leaves the head out
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def notes(self, matrices: Mapping[str, QuantizedMatrix], experts: Collection[str] = ()) -> list[str]:
        notes = joined_experts(matrices, experts)
        if any(matrix.grid.points is None for matrix in matrices.values()):
            notes.append("bitsandbytes computes with inputs rounded to int8, too: expect slightly other scores there")
        return notes

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        for kind in _TYPES:
            names = [name for name in specs if name.endswith(_STATE + kind)]
            if names:
                return kind, names
        blocks = [name for name in specs if name.endswith(".absmax")]
        if blocks:
            return "4 bits", blocks
        rows = [name for name in specs if name.endswith(".SCB")]
        return ("int8", rows) if rows else None

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        matrices: dict[str, Restorable] = {}
        used: set[str] = set()
        for name in stored.tensors:
            weight, _, end = name.rpartition(".")
            if end not in ("absmax", "SCB"):
                continue
            weight = weight if end == "absmax" else f"{weight}.weight"
            parts = stored.parts(weight, _SUFFIXES) if end == "absmax" else {"SCB": stored.tensors[name]}
            used |= {weight, *(f"{weight}.{part}" for part in parts), name}
            with error_context(weight):
                parts["weight"] = required(stored.tensors, weight)
                if end == "absmax":
                    matrices[weight] = _blocks(parts)
                    continue
                form = f"{weight}_format"
                if form in stored.tensors:
                    used.add(form)
                    _refuse_tiles(stored.tensors[form])
                matrices[weight] = _rows(parts["weight"], parts["SCB"])
        return matrices, used


class BitsAndBytesNested(BitsAndBytes):
    """The same, with scales of 4 bits that are quantized themselves."""

    name = "bitsandbytes_nested"
    bits = ()
    is_nested = True

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        return None  # the other reads both


def _blocks(parts: Mapping[str, Lazy]) -> Restorable:
    """A weight of 4 bits."""
    state = _state(parts)
    shape, size = state.shape, state.block_size
    numel, n_blocks = math.prod(shape), -(-math.prod(shape) // size)
    stored = parts["weight"]
    if stored.spec.nbytes != (numel + 1) // 2:
        raise SpecError(f"it is {stored.spec}; expected {(numel + 1) // 2} bytes for {list(shape)}", hint=REMEDY)
    table = struct.unpack("<16f", small(required(parts, "quant_map", TensorSpec(DType.F32, (16,)))))
    if not all(map(math.isfinite, table)):
        raise SpecError("quant_map holds NaN or infinities", hint=REMEDY)
    points = next((known for known in _TYPES.values() if known.values == table), Points(state.kind, 4, table))
    # Blocks follow each other through all rows: where they do not fall on the rows, all is one long row.
    n_out, n_in = shape[0], math.prod(shape[1:])
    is_even = n_in % size == 0 and n_in % 2 == 0
    rows, columns = (n_out, n_in) if is_even else (1, numel)
    scales = _scales(parts, state, TensorSpec(DType.F32, (rows, n_blocks // rows)))
    codes = _swapped(view_as(stored, DType.U8, (rows, (columns + 1) // 2)))
    matrix = QuantizedMatrix(
        Grid(4, size, points=points),
        (rows, columns),
        codes,
        scales,
        source=f"{state.kind} block {size}",
        dtype=state.dtype,
    )
    return matrix if matrix.shape == shape else Rearranged(matrix, lambda weight: view_as(weight, weight.dtype, shape))


def _swapped(pairs: Lazy) -> Lazy:
    """Bytes of two codes with the other one first."""
    return Apply("swap", [pairs], pairs.spec, lambda x: (x << 4) | (x >> 4)).output()


def _scales(parts: Mapping[str, Lazy], state: _State, spec: TensorSpec) -> Lazy:
    """The largest absolute value of each block, float32 [rows, blocks in a row]."""
    n = spec.numel
    if "nested_absmax" not in parts:
        return view_as(required(parts, "absmax", TensorSpec(DType.F32, (n,))), DType.F32, spec.shape)
    size = state.nested_block_size
    nested = NestedScales(
        required(parts, "absmax", TensorSpec(DType.U8, (n,))),
        required(parts, "nested_absmax", TensorSpec(DType.F32, (-(-n // size),))),
        required(parts, "nested_quant_map", TensorSpec(DType.F32, (256,))),
        constant_of([state.nested_offset], DType.F32, (1,)),
        size,
    )
    return nested.scales((spec.shape[0], spec.shape[1]))


def _state_of(entry: Mapping[str, Any], offset: Lazy | None) -> Lazy:
    """The JSON object as bytes, filled up with spaces: only data tells how many digits the offset has."""

    def text(offset: float | None) -> bytes:
        return json.dumps({**entry, **({} if offset is None else {"nested_offset": offset})}).encode()

    if offset is None:
        return constant_of(text(None), DType.U8, (len(text(None)),))
    spec = TensorSpec(DType.U8, (len(text(0.0)) + _MOST_DIGITS,))

    def fn(number: torch.Tensor) -> torch.Tensor:
        return torch.tensor(list(text(float(number)).ljust(spec.numel)), dtype=torch.uint8)

    return Apply("state", [offset], spec, fn, dict(entry), row_step=None, input_rows=[0], output_rows=[0]).output()


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
    states = [end for end in parts if end.startswith(_STATE)]
    if len(states) != 1:
        raise SpecError(f"it has {len(states)} tensors {_STATE}nf4 or fp4; expected one", hint=REMEDY)
    entry = parse_object(small(parts[states[0]]), states[0])

    def positive(key: str) -> int:
        value = entry.get(key)
        if type(value) is not int or not 0 < value <= 2**20:
            raise SpecError(f"{states[0]}: {key} is {str(value)[:60]!r}, which is no size of a block", hint=REMEDY)
        return value

    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or any(type(n) is not int or not 0 < n < 2**40 for n in shape):
        raise SpecError(f"{states[0]}: shape is {str(shape)[:60]!r}; expected numbers of rows and columns", hint=REMEDY)
    offset = entry.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise SpecError(f"{states[0]}: nested_offset is {str(offset)[:60]!r}; expected a number", hint=REMEDY)
    nested = positive("nested_blocksize") if "nested_absmax" in parts else 0
    return _State(
        states[0].removeprefix(_STATE),
        tuple(shape),
        positive("blocksize"),
        nested,
        float(offset),
        _DTYPES.get(str(entry.get("dtype"))),
    )


def _refuse_tiles(form: Lazy) -> None:
    if any(small(form)):
        raise RequirementError("its int8 lies in tiles of a GPU (weight_format), which are not read", hint=REMEDY)


def _rows(values: Lazy, largest: Lazy) -> _Rows:
    if values.dtype is not DType.I8 or len(values.shape) != 2:
        raise SpecError(f"it is {values.spec}; expected int8 [out, in]", hint=REMEDY)
    required({"SCB": largest}, "SCB", TensorSpec(DType.F32, values.shape[:1]))
    return _Rows(values, largest)


@dataclass(frozen=True, eq=False)
class _Rows:
    """int8 [out, in] and the largest absolute value of each row, float32 [out]."""

    values: Lazy
    largest: Lazy

    @property
    def matrix(self) -> QuantizedMatrix:
        """The codes, and scales that differ from what the library multiplies by in their last bit."""
        n_out, n_in = self.values.shape
        column = TensorSpec(DType.F32, (n_out, 1))
        scales = Apply("scales", [self.largest], column, lambda x: x.view(-1, 1) * _STEP).output()
        return QuantizedMatrix(Grid(8), (n_out, n_in), from_signed(self.values, 8), scales)

    def dequantized(self, dtype: DType | None = None) -> Lazy:
        """The float weight: (value * largest) * (1 / 127), rounded in this order, as the library does."""
        wanted = dtype or DType.F32

        def fn(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
            return (values * largest.view(-1, 1)).mul_(_STEP).to(wanted.torch)

        spec = self.values.spec.with_dtype(wanted)
        node = Decoded("dequantize", [self.values, self.largest], spec, fn, {"bits": 8}, scratch=1.0)
        node.matrix, node.source = self.matrix, "int8"
        return node.output()


CODEC, NESTED = BitsAndBytes(), BitsAndBytesNested()
