"""Scales that are quantized themselves: bitsandbytes' double quantization of the largest values of blocks.

    scale = table[code] * largest[block of 256 codes] + offset

The offset is the mean of all scales, and the table the library's dynamic map: 256 numbers from -1 to 1 that lie closer
the smaller they are (Dettmers et al. 2021, arXiv:2110.02861). They are float32 throughout.

Source: bitsandbytes/functional.py of bitsandbytes-foundation/bitsandbytes (`create_dynamic_map`, `quantize_4bit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llmkit.lazy_imports import torch
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import sliceable, view_as
from llmkit.tensors.spec import DType, TensorSpec

_SIZE = 256


@dataclass(frozen=True, eq=False)
class NestedScales:
    """What scales are made of.

    Attributes:
        codes: uint8 [n], of all scales.
        largest: float32 [ceil(n / size)], the largest size in each block of codes.
        table: float32 [256], what codes stand for.
        offset: float32 [1], added to all.
        size: codes of a block.
    """

    codes: Lazy
    largest: Lazy
    table: Lazy
    offset: Lazy
    size: int

    def scales(self, shape: tuple[int, int]) -> Lazy:
        """Float32 [rows, blocks in a row]; it remembers its parts (`parts_of_scales`)."""
        size, n = self.size, self.codes.spec.numel

        def fn(codes: torch.Tensor, largest: torch.Tensor, table: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            values = table[codes.int()] * largest.repeat_interleave(size)[:n]
            return (values + offset).view(shape)

        inputs = [self.codes, self.largest, self.table, self.offset]
        node = _Restored("nested scales", inputs, TensorSpec(DType.F32, shape), fn, {"size": size}, row_step=None)
        node.parts = self
        return sliceable(node.output())  # blocks of scales cross the rows: computed whole, and cut


class _Restored(Apply):
    """Scales computed from their parts."""

    parts: NestedScales


def parts_of_scales(scales: Lazy) -> NestedScales | None:
    """What scales are made of; None where they are not nested, or not all of a matrix."""
    inputs = scales.node.inputs
    node = inputs[0].node if scales.node.op == "concat" and len(inputs) == 1 else None
    return node.parts if isinstance(node, _Restored) else None


def nested_scales(scales: Lazy) -> Lazy:
    """Scales [rows, blocks in a row] as they are once they were quantized: float32, with their parts."""
    n = scales.spec.numel
    specs = [TensorSpec(DType.U8, (n,)), TensorSpec(DType.F32, (-(-n // _SIZE),)), TensorSpec(DType.F32, (1,))]

    def fn(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        offset = flat.mean()
        missing = -n % _SIZE
        blocks = torch.nn.functional.pad(flat - offset, (0, missing)).view(-1, _SIZE)
        largest = blocks.abs().amax(1)
        table = torch.tensor(dynamic_map())
        shares = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2).to(torch.uint8)
        return codes.view(-1)[:n], largest, offset.view(1)

    flat = view_as(scales.cast(DType.F32), DType.F32, (n,))
    codes, largest, offset = Apply("nest", [flat], specs, fn, row_step=None).outputs()
    table = constant_of(dynamic_map(), DType.F32, (_SIZE,))
    return NestedScales(codes, largest, table, offset, _SIZE).scales((scales.shape[0], scales.shape[1]))


@cache
def dynamic_map() -> tuple[float, ...]:
    """The table of the library, in rising order."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        middles = (10.0 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += [*middles, *(-x for x in middles)]
    return tuple(sorted(values))
