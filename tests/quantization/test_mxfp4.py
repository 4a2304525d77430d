"""Experts in MXFP4 are restored as transformers restores them, bit for bit, one expert at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import save_file

from llmkit.api import save
from llmkit.architecture.registry import default_registry
from llmkit.architecture.storage import part_of
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import LlmkitError, RequirementError
from llmkit.quantization.codecs.gguf import as_blocks
from llmkit.quantization.matrix import Grid, QuantizedMatrix, matrix_of
from llmkit.quantization.points import MXFP4
from llmkit.tensors.constant import constant_of
from llmkit.tensors.lazy import Context
from llmkit.tensors.rearrange import zeros
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms import lora
from llmkit.transforms.convert import convert

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


def published(path, **sizes):
    """A tiny gpt-oss as it is published: experts in MXFP4, all else in bfloat16."""
    registry = default_registry()
    family = registry.load(next(p for p in registry.plugins if p.name == "gpt_oss"))
    config = family.tiny_config() | {"hidden_size": 32, "intermediate_size": 64} | sizes
    tensors = {name: lazy.load().bfloat16() for name, lazy in random_checkpoint(family, config).tensors.items()}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        n, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (n, rows, columns // 32, 16), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(121, 124, blocks.shape[:3]).byte()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    entry = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return path


@pytest.fixture
def model(tmp_path):
    return published(tmp_path)


def test_a_published_model_computes_what_transformers_does(model):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        expected = theirs(ids).logits
    assert torch.allclose(load_decoder(open_checkpoint(model))(ids), expected, atol=1e-5)


def test_each_expert_remembers_its_codes(model):
    floats = dequantized(open_checkpoint(model))
    slot = floats.model.slots["layers.0.mlp.experts.gate_up.weight"]
    up = part_of(floats.tensors[slot.name], slot, "layers.0.mlp.experts.1.up.weight")
    matrix = matrix_of(up)
    assert (matrix.shape, matrix.bits, matrix.grid.group_size) == ((64, 32), 4, 32)
    assert torch.equal(matrix.dequantized(DType.F32).load(), up.load().float())


def test_a_copy_keeps_every_byte(model, tmp_path):
    ckpt = open_checkpoint(model)
    copy = convert(ckpt, to="hf")
    assert copy.tensors.keys() == ckpt.tensors.keys()
    assert all(torch.equal(copy.tensors[name].load(), lazy.load()) for name, lazy in ckpt.tensors.items())
    assert copy.config["quantization_config"] == ckpt.config["quantization_config"]


def adapter_of(path, stem, *shape):
    """A LoRA of rank 2 for one module of the shape [out, in]."""
    path.mkdir()
    key = f"base_model.model.{stem}."
    parts = {f"{key}lora_A.weight": torch.randn(2, shape[1]), f"{key}lora_B.weight": torch.randn(shape[0], 2)}
    save_file(parts, path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [stem.rpartition(".")[2]]}
    (path / "adapter_config.json").write_text(json.dumps(about))
    return lora.open_adapter(path)


@pytest.mark.parametrize("requantize", [False, True])
def test_an_adapter_of_what_is_in_floats_leaves_the_experts_as_they_are(model, tmp_path, requantize):
    """Most adapters of gpt-oss change the attention, which is in bfloat16."""
    base = open_checkpoint(model)
    stem = "model.layers.0.self_attn.o_proj"
    adapter = adapter_of(tmp_path / "a", stem, *base.tensors[f"{stem}.weight"].shape)
    save(lora.merge(base, [adapter], requantize=requantize), tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    assert list(merged.tensors) == list(base.tensors)
    assert merged.config["quantization_config"] == base.config["quantization_config"]
    changed = {n for n, lazy in merged.tensors.items() if not torch.equal(lazy.load(), base.tensors[n].load())}
    assert changed == {f"{stem}.weight"}
    dense = lora.merge(dequantized(base), [adapter]).tensors[f"{stem}.weight"].load()
    assert torch.equal(merged.tensors[f"{stem}.weight"].load(), dense)
    load_decoder(merged)(torch.arange(12).view(1, 12))


def test_an_adapter_of_experts_in_float4_is_refused_with_what_to_do(model, tmp_path):
    base = open_checkpoint(model)
    floats = dequantized(base)
    n, n_in, n_out = floats.tensors[STEM].shape
    key = f"base_model.model.{STEM.rpartition('.')[0]}."
    update = {f"{key}lora_A.weight": torch.randn(2 * n, n_in), f"{key}lora_B.weight": torch.randn(n_out, 2 * n)}
    (tmp_path / "a").mkdir()
    save_file(update, tmp_path / "a" / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": [STEM]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(about))
    adapter = lora.open_adapter(tmp_path / "a")
    with pytest.raises(RequirementError, match=r"read and not written: .*gate_up_proj is changed") as caught:
        lora.merge(base, [adapter], requantize=True)
    assert "--to dense" in caught.value.hint
    with pytest.raises(RequirementError, match="already quantized"):
        lora.merge(base, [adapter])


def test_gguf_keeps_every_code(model, tmp_path):
    floats = dequantized(open_checkpoint(model), dtype=DType.F32)
    save(replace(convert(open_checkpoint(model), to="gguf"), label="tiny"), tmp_path / "a")
    path = next((tmp_path / "a").glob("*-MXFP4.gguf"))
    file = gguf.GGUFReader(path)
    stored = {t.name: t for t in file.tensors}
    assert file.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    gate_up = floats[STEM].load().transpose(1, 2)
    down = floats[STEM.replace("gate_up", "down")].load().transpose(1, 2)
    for part, want in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
        tensor = stored[f"blk.0.ffn_{part}_exps.weight"]
        assert tensor.tensor_type is gguf.GGMLQuantizationType.MXFP4
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.from_numpy(found).view(want.shape), want)
    back = open_checkpoint(path)
    assert back.tensors.keys() == floats.tensors.keys()
    assert all(torch.equal(back.tensors[name].load().float(), lazy.load()) for name, lazy in floats.tensors.items())
    save(convert(back, to="gguf"), tmp_path / "b")
    again = gguf.GGUFReader(next((tmp_path / "b").glob("*.gguf")))
    assert all((t.data == stored[t.name].data).all() for t in again.tensors)


def test_gguf_has_no_other_scales_than_powers():
    codes = zeros(TensorSpec(DType.U8, (1, 16)))
    for value, held in ((1.5, False), (0.5, True), (float("inf"), False)):
        matrix = QuantizedMatrix(Grid(4, 32, points=MXFP4), (1, 32), codes, constant_of([value], DType.F32, (1, 1)))
        assert (as_blocks(matrix.dequantized(DType.F32)) is not None) == held
