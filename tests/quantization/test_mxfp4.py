"""Experts in MXFP4 are restored as transformers restores them, bit for bit, one expert at a time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import LlmkitError
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType

STEM = "model.layers.0.mlp.experts.gate_up_proj"


def made(n_experts=3, n_out=10, n_groups=2):
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (n_experts, n_out, n_groups, 16), dtype=torch.uint8)
    return {f"{STEM}_blocks": blocks, f"{STEM}_scales": torch.randint(90, 160, blocks.shape[:3], dtype=torch.uint8)}


def opened(path, tensors):
    save_file(tensors | {f"{STEM}_bias": torch.ones(3)}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    return open_checkpoint(path)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_equals_transformers(tmp_path, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = made()
    expected = convert_moe_packed_tensors(*tensors.values(), dtype=dtype.torch)
    ckpt = opened(tmp_path, tensors)
    assert describe(ckpt) == "float4 blocks, mxfp4"
    floats = dequantized(ckpt, dtype=dtype)
    assert sorted(floats.tensors) == [STEM, f"{STEM}_bias"]
    lazy = floats[STEM]
    assert lazy.shape == (3, 64, 10)
    assert torch.equal(lazy.load(), expected)
    assert torch.equal(Context().rows(lazy, (1, 3)), expected[1:])
    assert lazy.node.row_step == 1


@pytest.mark.parametrize(
    ("end", "part", "message"),
    [
        ("blocks", torch.zeros(3, 10, 2, 8, dtype=torch.uint8), r"expected U8\[experts, out, groups, 16\]"),
        ("blocks", torch.zeros(3, 10, 2, 16), "is F32"),
        ("blocks", torch.zeros(30, 2, 16, dtype=torch.uint8), "expected U8"),
        ("scales", torch.zeros(3, 10, 1, dtype=torch.uint8), r"expected U8\[3, 10, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, end, part, message):
    with pytest.raises(LlmkitError, match=message):
        dequantized(opened(tmp_path, made() | {f"{STEM}_{end}": part}))
