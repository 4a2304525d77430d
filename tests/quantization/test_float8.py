"""Float8 weights restored are those of transformers (blocks) and of compressed-tensors, bit for bit."""

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

DTYPES = [DType.BF16, DType.F32, DType.F16]


def values(n_out, n_in, dtype=torch.float8_e4m3fn):
    generator = torch.Generator().manual_seed(n_out)
    return (torch.randn((n_out, n_in), generator=generator) * 50).to(dtype)


def folder(path, tensors, entry):
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    return open_checkpoint(path)


def blocks(path, weight, scales, size):
    entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    return folder(path, {"a.weight": weight, "a.weight_scale_inv": scales, "b.bias": torch.ones(3)}, entry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "scale"), [([16, 32], torch.float32), ([64, 16], torch.bfloat16), ([16, 16], torch.uint8)]
)
def test_blocks_are_those_of_transformers(tmp_path, dtype, size, scale):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, n_scales = values(64, 96), (64 // size[0], 96 // size[1])
    scales = torch.randint(118, 124, n_scales, dtype=scale) if scale is torch.uint8 else torch.rand(n_scales).to(scale)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype.torch)
    ckpt = blocks(tmp_path, weight, scales, size)
    assert describe(ckpt) == "float8, fp8"
    floats = dequantized(ckpt, dtype=dtype)
    assert sorted(floats.tensors) == ["a.weight", "b.bias"]
    assert torch.equal(floats["a.weight"].load(), expected)
    cut = [Context().rows(floats["a.weight"], rows) for rows in ((0, 5), (5, 40), (40, 64))]
    assert torch.equal(torch.cat(cut), expected)
    assert any("activations in float8" in warning for warning in floats.warnings)


def test_the_last_block_may_be_cut(tmp_path):
    weight, scales = values(20, 40), torch.rand(2, 3)
    expected = weight.float() * scales.repeat_interleave(16, 0)[:20].repeat_interleave(16, 1)[:, :40]
    found = dequantized(blocks(tmp_path, weight, scales, [16, 16]), dtype=DType.F32)
    assert torch.equal(found["a.weight"].load(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_schemes_are_those_of_compressed_tensors(tmp_path, dtype, strategy):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    weight = values(32, 64)
    shapes = {"tensor": (1,), "channel": (32, 1), "group": (32, 4), "block": (2, 4)}
    scales = torch.rand(shapes[strategy]).to(dtype.torch)
    more = {"group": {"group_size": 16}, "block": {"block_structure": [16, 16]}}.get(strategy, {})
    args = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    expected = dequantize(weight, scales, args=QuantizationArgs(**args), dtype=None)
    group = {
        "targets": ["Linear"],
        "weights": args,
        "input_activations": {"dynamic": True, "num_bits": 8, "type": "float"},
    }
    entry = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    floats = dequantized(folder(tmp_path, {"a.weight": weight, "a.weight_scale": scales}, entry), dtype=dtype)
    assert torch.equal(floats["a.weight"].load(), expected)
    assert any("input_activations" in warning for warning in floats.warnings)


@pytest.mark.parametrize(
    ("size", "scales", "word"),
    [
        ([16, 16], torch.ones(2, 2), "needs scales"),
        ([0, 16], torch.ones(2, 4), "expected two sizes"),
        (["a", 16], torch.ones(2, 4), "expected two sizes"),
        (128, torch.ones(2, 4), "expected two sizes"),
        ([16, 16], torch.ones(2, 4, dtype=torch.int32), "expected floats"),
    ],
)
def test_what_does_not_fit_together(tmp_path, size, scales, word):
    with pytest.raises(LlmkitError, match=word):
        dequantized(blocks(tmp_path, values(32, 64), scales, size))


def one_number(weight):
    """As AutoFP8 and ModelOpt store a tensor: the number has no dimension, or one."""
    return torch.tensor(0.25), weight.float() * 0.25


def one_a_row(weight):
    """As FBGEMM stores it."""
    scales = torch.rand(len(weight), 1)
    return scales, weight.float() * scales


KV = {"a.k_proj.k_scale": torch.tensor(1.0), "a.v_proj.v_scale": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("entry", "scaled", "more"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, one_number, {"input_scale": torch.tensor(0.5)}),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, one_number, {}),
        ({"quant_method": "fbgemm_fp8"}, one_a_row, {"input_scale_ub": torch.tensor([1200.0])}),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, one_number, {"input_scale": torch.tensor(0.5)}),
        (None, one_number, {"input_scale": torch.tensor(0.5)}),
    ],
)
def test_scales_that_no_group_describes(tmp_path, entry, scaled, more):
    """A weight is its value times the scale beside it (vLLM's fp8.py, fbgemm_fp8.py and modelopt.py)."""
    tensors, expected = {"b.bias": torch.ones(3)}, {}
    for i, module in enumerate(("a.k_proj", "a.v_proj")):
        weight = values(32 + i, 64)
        scales, expected[f"{module}.weight"] = scaled(weight)
        tensors |= {f"{module}.weight": weight, f"{module}.weight_scale": scales}
        tensors |= {f"{module}.{end}": part.clone() for end, part in more.items()}
    ckpt = folder(tmp_path, tensors | KV, entry)
    if entry is None or "quant_algo" in entry:  # releases of ModelOpt before 0.29 have this file alone
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
        ckpt = open_checkpoint(tmp_path)
    floats = dequantized(ckpt, dtype=DType.F32)
    assert sorted(floats.tensors) == [*sorted(expected), "b.bias"]
    assert all(torch.equal(floats[name].load(), weight) for name, weight in expected.items())
    assert "hf_quant_config.json" not in floats.files
    assert any("activations in" in warning for warning in floats.warnings)


def test_float4_of_modelopt(tmp_path):
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    scales, of_all = torch.rand(6, 4).to(torch.float8_e4m3fn), torch.tensor(0.0123)
    tensors = {
        "a.weight": codes[:, ::2] | codes[:, 1::2] << 4,
        "a.weight_scale": scales,
        "a.weight_scale_2": of_all,
        "a.input_scale": torch.tensor(1.0),
    }
    signed = table[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    expected = (signed.view(6, 4, 16) * (scales.float() * of_all)[..., None]).view(6, 64)
    for entry in ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None):
        floats = dequantized(folder(tmp_path, tensors, entry), dtype=DType.F32)
        assert list(floats.tensors) == ["a.weight"]
        assert torch.equal(floats["a.weight"].load(), expected)
    with pytest.raises(LlmkitError, match=r"a: weight_scale is missing"):
        dequantized(folder(tmp_path, {k: v for k, v in tensors.items() if k != "a.weight_scale"}, entry))
