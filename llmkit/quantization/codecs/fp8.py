"""Float8 with its scales beside it: in blocks, one for each row, or one for the tensor; shapes tell which.

    weight             float8_e4m3fn [out, in]
    weight_scale_inv   floats [blocks of rows, blocks of columns], or one number (DeepSeek V3, Qwen3; Mistral)
    weight_scale       the same under another name: [out, 1] (FBGEMM), or one number (AutoFP8 for vLLM; ModelOpt)

A weight is its value times the scale. What is said of inputs, keys and values (`input_scale`, `activation_scale`,
`k_scale`, ...) has no use here: they stay floats. `weight_block_size` of the quantization entry says how large blocks
are, 128 x 128 where it does not.

Sources: transformers, integrations/finegrained_fp8.py and fbgemm_fp8.py; deepseek-ai/DeepSeek-V3,
inference/fp8_cast_bf16.py; vllm-project/vllm, model_executor/layers/quantization/{fp8,fbgemm_fp8,modelopt}.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.quantization.codec import FolderReader, Specs, StoredFolder, error_context, meant_for
from llmkit.quantization.float8 import FLOAT8, ScaledFloats, block_of
from llmkit.quantization.matrix import Restorable
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import view_as
from llmkit.tensors.spec import TensorSpec

_SCALES = ("_scale_inv", "_scale")
UNUSED = ("activation_scale", "input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")
_BLOCK = [128, 128]


class BlockFloat8(FolderReader):
    """Read, not written."""

    name = "fp8"
    also = ("fbgemm_fp8",)

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        names = [name for name in specs if scale_of(name, specs)]
        return ("float8", names) if names else None

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        matrices: dict[str, Restorable] = {}
        used: set[str] = set()
        specs = {name: lazy.spec for name, lazy in stored.tensors.items()}
        block = stored.entry.get("weight_block_size") or _BLOCK
        for name in specs:
            if scale := scale_of(name, specs):
                with error_context(name):
                    matrices[name] = _restorable(stored.tensors[name], stored.tensors[scale], block)
                module = name.rpartition(".")[0]
                used |= {name, scale, *(f"{module}.{end}" for end in UNUSED)}
        return matrices, used

    def warnings(self, stored: StoredFolder) -> list[str]:
        return [meant_for("activations in float8")]


def scale_of(name: str, specs: Mapping[str, TensorSpec]) -> str:
    """The name of the scales of a weight in float8; empty for other tensors."""
    spec = specs[name]
    if spec.dtype not in FLOAT8 or len(spec.shape) != 2:
        return ""
    return next((name + end for end in _SCALES if name + end in specs), "")


def _restorable(values: Lazy, scales: Lazy, block: object) -> ScaledFloats:
    n_out = values.shape[0]
    scheme: dict[str, object] = {"num_bits": 8, "strategy": "block", "block_structure": block}
    if scales.spec.numel == 1:
        scheme["strategy"] = "tensor"
    elif scales.shape in ((n_out,), (n_out, 1)):
        scheme["strategy"], scales = "channel", view_as(scales, scales.dtype, (n_out, 1))
    return ScaledFloats(values, scales, block_of(scheme, values.shape))


CODEC = BlockFloat8()
