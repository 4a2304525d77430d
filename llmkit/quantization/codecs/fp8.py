"""Float8 in blocks, as DeepSeek V3 and Qwen3 publish it, and with one scale for a tensor, as Mistral does.

    weight             float8_e4m3fn [out, in]
    weight_scale_inv   floats [blocks of rows, blocks of columns], or one number; a weight is its value times that
    activation_scale   one number, where the activations have a fixed scale; they stay floats here

`weight_block_size` of the quantization entry says how large blocks are, 128 x 128 where it does not.

Sources: transformers, integrations/finegrained_fp8.py; deepseek-ai/DeepSeek-V3, inference/fp8_cast_bf16.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.quantization.codec import FolderReader, Specs, StoredFolder, error_context
from llmkit.quantization.float8 import FLOAT8, ScaledFloats, block_of
from llmkit.tensors.spec import TensorSpec

_SCALE = "_scale_inv"
_OF_ACTIVATIONS = ("activation_scale", "input_scale")
_BLOCK = [128, 128]


class BlockFloat8(FolderReader):
    """Read, not written."""

    name = "fp8"

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        names = [name for name in specs if _is_quantized(name, specs)]
        return ("float8", names) if names else None

    def matrices(self, stored: StoredFolder) -> tuple[dict[str, ScaledFloats], set[str]]:
        matrices: dict[str, ScaledFloats] = {}
        used: set[str] = set()
        specs = {name: lazy.spec for name, lazy in stored.tensors.items()}
        block = stored.entry.get("weight_block_size") or _BLOCK
        scheme = {"num_bits": 8, "strategy": "block", "block_structure": block}
        for name in specs:
            if _is_quantized(name, specs):
                values, scales = stored.tensors[name], stored.tensors[name + _SCALE]
                strategy = {"strategy": "tensor"} if scales.spec.numel == 1 else {}
                with error_context(name):
                    matrices[name] = ScaledFloats(values, scales, block_of(scheme | strategy, values.shape))
                module = name.rpartition(".")[0]
                used |= {name, name + _SCALE, *(f"{module}.{end}" for end in _OF_ACTIVATIONS)}
        return matrices, used

    def warnings(self, stored: StoredFolder) -> list[str]:
        return [
            "the model was meant to run with activations in float8; here only its weights are: expect slightly other "
            "scores"
        ]


def _is_quantized(name: str, specs: Mapping[str, TensorSpec]) -> bool:
    spec = specs[name]
    return spec.dtype in FLOAT8 and len(spec.shape) == 2 and name + _SCALE in specs


CODEC = BlockFloat8()
