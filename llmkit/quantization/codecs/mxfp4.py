"""MXFP4 as gpt-oss is published: experts in float4 (e2m1), 32 of which share a power of two.

    NAME_blocks   uint8 [experts, out, groups, 16], two values in a byte, the first in the low bits
    NAME_scales   uint8 [experts, out, groups], the exponent plus 127

The float model has NAME, [experts, in, out].

Source: transformers, integrations/mxfp4.py (`convert_moe_packed_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.errors import SpecError
from llmkit.quantization.codec import REMEDY, FolderReader, Specs, StoredFolder, error_context, required
from llmkit.quantization.float8 import powers_of_two
from llmkit.quantization.matrix import Grid, QuantizedMatrix, Rearranged, Restorable
from llmkit.quantization.points import MXFP4
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.moving import Stack, TakeRows
from llmkit.tensors.rearrange import transpose, view_as
from llmkit.tensors.spec import DType, TensorSpec

_BLOCKS, _SCALES = "_blocks", "_scales"
_SIZE = 32


class MicroscalingFloat4(FolderReader):
    """Read, not written."""

    name = "mxfp4"

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        stems = {name.removesuffix(_BLOCKS) for name in specs if name.endswith(_BLOCKS)}
        names = [f"{stem}{_BLOCKS}" for stem in sorted(stems) if f"{stem}{_SCALES}" in specs]
        return ("float4 blocks", names) if names else None

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        matrices: dict[str, Restorable] = {}
        used: set[str] = set()
        for name, blocks in stored.tensors.items():
            stem = name.removesuffix(_BLOCKS)
            if stem == name or f"{stem}{_SCALES}" not in stored.tensors:
                continue
            with error_context(stem):
                shape = blocks.shape
                if blocks.dtype is not DType.U8 or len(shape) != 4 or shape[3] != _SIZE // 2 or not blocks.spec.numel:
                    raise SpecError(
                        f"{name} is {blocks.spec}; expected U8[experts, out, groups, {_SIZE // 2}]", hint=REMEDY
                    )
                scales = required(stored.tensors, f"{stem}{_SCALES}", TensorSpec(DType.U8, shape[:3]))
                matrices[stem] = _experts(blocks, scales)
            used |= {name, f"{stem}{_SCALES}"}
        return matrices, used


def _experts(blocks: Lazy, exponents: Lazy) -> Rearranged:
    n_experts, n_out, n_groups, _ = blocks.shape
    rows, n_in = n_experts * n_out, n_groups * _SIZE

    scales = powers_of_two(exponents, (rows, n_groups))
    codes = view_as(blocks, DType.U8, (rows, n_in // 2))
    matrix = QuantizedMatrix(Grid(4, _SIZE, points=MXFP4), (rows, n_in), codes, scales, source="MXFP4")

    def stacked(weights: Lazy) -> Lazy:
        """[experts, in, out]."""
        own = (TakeRows(weights, i * n_out, (i + 1) * n_out).output() for i in range(n_experts))
        return Stack([transpose(rows) for rows in own]).output()

    return Rearranged(matrix, stacked)


CODEC = MicroscalingFloat4()
