"""NVIDIA's ModelOpt, as its folders for Hugging Face have it: float8 and NVFP4.

    float8   as `fp8` has it, with one scale
    NVFP4    weight           uint8 [out, in / 2], two values of float4 in a byte, the first in the low bits
             weight_scale     float8 e4m3 [out, in / 16]
             weight_scale_2   one float32; a weight is its value times both

`hf_quant_config.json` says how they were made; older releases have only that. Their integers (AWQ in 4 bits) are not
read. Source: modelopt/torch/export of NVIDIA/Model-Optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.lazy_imports import torch
from llmkit.quantization.codec import FolderReader, Specs, StoredFolder, error_context, meant_for, required
from llmkit.quantization.codecs.fp8 import CODEC as FLOAT8
from llmkit.quantization.codecs.fp8 import UNUSED
from llmkit.quantization.matrix import Grid, QuantizedMatrix, Restorable
from llmkit.quantization.points import MXFP4
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import view_as
from llmkit.tensors.spec import DType, TensorSpec

_SIZE = 16
_SECOND = ".weight_scale_2"
_SUFFIXES = ("weight", "weight_scale", "weight_scale_2")


class ModelOpt(FolderReader):
    """Read, not written."""

    name = "modelopt"
    also = ("modelopt_fp4",)
    config_file = "hf_quant_config.json"

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        names = [f"{module}.weight" for module in _modules(specs)]
        return ("float4 group 16", names) if names else None

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        floats, used = FLOAT8.matrices(stored)
        matrices = dict(floats)
        for module in _modules(stored.tensors):
            with error_context(module):
                matrices[f"{module}.weight"] = _float4(stored.parts(module, _SUFFIXES))
            used |= {f"{module}.{end}" for end in (*_SUFFIXES, *UNUSED)}
        return matrices, used

    def warnings(self, stored: StoredFolder) -> list[str]:
        return [meant_for("activations in the type of its weights")]


def _modules(names: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(_SECOND) for name in names if name.endswith(_SECOND)]


def _float4(parts: Mapping[str, Lazy]) -> QuantizedMatrix:
    """The matrix of its tensors.

    Raises:
        SpecError: they do not fit together.
    """
    stored = required(parts, "weight")
    n_out, n_bytes = (*stored.shape, 0, 0)[:2]
    shape = (n_out, n_bytes * 2 // _SIZE)
    required(parts, "weight", TensorSpec(DType.U8, (n_out, shape[1] * _SIZE // 2)))
    scales = required(parts, "weight_scale", TensorSpec(DType.F8_E4M3, shape))
    second = required(parts, "weight_scale_2", TensorSpec(DType.F32, ()), TensorSpec(DType.F32, (1,)))

    def fn(scales: torch.Tensor, of_all: torch.Tensor) -> torch.Tensor:
        return scales.float() * of_all

    second = view_as(second, DType.F32, (1,))
    product = Apply("multiply", [scales, second], TensorSpec(DType.F32, shape), fn, input_rows=[1, 0]).output()
    return QuantizedMatrix(Grid(4, _SIZE, points=MXFP4), (n_out, n_bytes * 2), stored, product, source="NVFP4")


CODEC = ModelOpt()
