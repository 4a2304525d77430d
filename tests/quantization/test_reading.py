"""Restored weights equal compressed-tensors' own decompression, bit for bit, whole and in row slices."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import RequirementError, SpecError
from llmkit.quantization.packing import pack
from llmkit.quantization.reading import dequantized, describe, model_dtype
from llmkit.quantization.schemes import Scheme
from llmkit.tensors.lazy import Context
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType

SCHEMES = [Scheme(b, g, s) for b in (4, 8) for g in (None, 32) for s in (True, False)]


def module_tensors(scheme: Scheme, layout: str, dtype: torch.dtype, shape=(20, 96)) -> dict[str, torch.Tensor]:
    """One quantized layer with random grid points: what any tool may have written."""
    generator = torch.Generator().manual_seed(1)
    groups = scheme.n_groups(shape[1])
    q = torch.randint(scheme.q_min, scheme.q_max + 1, shape, dtype=torch.int8, generator=generator)
    zero = torch.randint(scheme.q_min, scheme.q_max + 1, (shape[0], groups), dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], groups, generator=generator).add(0.1).to(dtype)
    tensors = {"weight_scale": scale}
    if layout == "pack-quantized":
        tensors |= {"weight_packed": pack(q, scheme.bits), "weight_shape": torch.tensor(shape)}
        zero = pack(zero, scheme.bits, dim=0)
    else:
        tensors["weight"] = q
    return tensors if scheme.is_symmetric else tensors | {"weight_zero_point": zero}


def write(folder: Path, tensors: dict[str, torch.Tensor], scheme: Scheme, layout: str, **config) -> Path:
    entry = scheme.quantization_config()
    entry["format"] = layout
    folder.mkdir(exist_ok=True)
    save_file(
        {f"blocks.0.lin.{k}": v for k, v in tensors.items()} | {"emb": torch.ones(3, 2)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry, **config}))
    return folder


def by_library(tensors: dict[str, torch.Tensor], scheme: Scheme, layout: str) -> torch.Tensor:
    weights = scheme.quantization_config()["config_groups"]["group_0"]["weights"]
    theirs = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    return BaseCompressor.get_value_from_registry(layout).decompress(dict(tensors), theirs)["weight"]


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "naive-quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_librarys_decompression(tmp_path, scheme, dtype, layout):
    tensors = module_tensors(scheme, layout, dtype)
    ckpt = dequantized(open_checkpoint(write(tmp_path / "m", tensors, scheme, layout)))
    assert list(ckpt.tensors) == ["blocks.0.lin.weight", "emb"]
    lazy = ckpt.tensors["blocks.0.lin.weight"]
    expected = by_library(tensors, scheme, layout)
    assert torch.equal(lazy.load(), expected)
    assert lazy.load().dtype == dtype
    step = lazy.node.row_step
    is_packed = layout == "pack-quantized" and not scheme.is_symmetric
    assert step == (scheme.per_word if is_packed else 1)
    parts = [Context().rows(lazy, (a, min(a + 8, 20))) for a in range(0, 20, 8)]
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("scheme", [Scheme(4, None, False), Scheme(8, None, True)], ids=str)
def test_rows_that_do_not_fill_their_words(tmp_path, scheme):
    tensors = module_tensors(scheme, "pack-quantized", torch.float32, (10, 37))
    ckpt = dequantized(open_checkpoint(write(tmp_path / "m", tensors, scheme, "pack-quantized")))
    loaded = ckpt.tensors["blocks.0.lin.weight"].load()
    assert loaded.shape == (10, 37)
    assert torch.equal(loaded, by_library(tensors, scheme, "pack-quantized"))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_models_dtype_wins_over_that_of_the_scales(tmp_path, key):
    """transformers casts the scales to the model's dtype when it loads them."""
    scheme = Scheme(4, 32, False)
    tensors = module_tensors(scheme, "pack-quantized", torch.float32)
    folder = write(tmp_path / "m", tensors, scheme, "pack-quantized", **{key: "bfloat16"})
    tensors["weight_scale"] = tensors["weight_scale"].to(torch.bfloat16)
    expected = by_library(tensors, scheme, "pack-quantized")
    ckpt = open_checkpoint(folder)
    assert torch.equal(dequantized(ckpt).tensors["blocks.0.lin.weight"].load(), expected)
    assert dequantized(ckpt, dtype=DType.F32).tensors["blocks.0.lin.weight"].dtype is DType.F32


def test_act_order_uses_the_group_of_each_column(tmp_path):
    scheme = Scheme(4, 32, False)
    tensors = module_tensors(scheme, "int-quantized", torch.float32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2)) // 32
    q, scale, zero = tensors["weight"].float(), tensors["weight_scale"], tensors["weight_zero_point"].float()
    expected = (q - zero[:, order]) * scale[:, order]
    packed = module_tensors(scheme, "pack-quantized", torch.float32) | {"weight_g_idx": order.int()}
    ckpt = dequantized(open_checkpoint(write(tmp_path / "m", packed, scheme, "pack-quantized")))
    assert torch.equal(ckpt.tensors["blocks.0.lin.weight"].load(), expected)


def test_nothing_is_read_until_a_tensor_is_loaded(tmp_path, monkeypatch):
    scheme = Scheme(4, 32, False)
    folder = write(tmp_path / "m", module_tensors(scheme, "pack-quantized", torch.float32), scheme, "pack-quantized")
    monkeypatch.setattr(SourceFile, "read_tensor", lambda *_: pytest.fail("read"))
    assert dequantized(open_checkpoint(folder)).tensors["blocks.0.lin.weight"].shape == (20, 96)


def test_config_of_the_float_model_and_a_float_checkpoint_as_it_is(tmp_path):
    scheme = Scheme(8)
    folder = write(
        tmp_path / "m", module_tensors(scheme, "pack-quantized", torch.float32), scheme, "pack-quantized", a=1
    )
    floats = dequantized(open_checkpoint(folder))
    assert floats.config == {"a": 1}
    assert dequantized(floats) is floats


def test_groups_with_other_schemes_and_names(tmp_path):
    a, b = Scheme(4, 32), Scheme(8)
    tensors = {f"x.first.{k}": v for k, v in module_tensors(a, "pack-quantized", torch.float32).items()}
    tensors |= {f"x.second.{k}": v for k, v in module_tensors(b, "pack-quantized", torch.float32).items()}
    entry = a.quantization_config(targets=["Linear"])
    entry["config_groups"]["group_1"] = b.quantization_config(targets=["re:.*second$"])["config_groups"]["group_0"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file(tensors, tmp_path / "model.safetensors")
    ckpt = open_checkpoint(tmp_path)
    floats = dequantized(ckpt)
    for name, scheme in (("first", a), ("second", b)):
        expected = by_library(module_tensors(scheme, "pack-quantized", torch.float32), scheme, "pack-quantized")
        assert torch.equal(floats.tensors[f"x.{name}.weight"].load(), expected)
    assert describe(ckpt) == "int4 group 32 symmetric, int8 per channel symmetric, compressed-tensors"


@pytest.mark.parametrize(
    ("targets", "message"),
    [(7, "no config group has it"), (None, "no config group has it"), (["re:("], "a target is no regular expression")],
)
def test_targets_of_other_types_are_refused(tmp_path, targets, message):
    scheme = Scheme(4, 32)
    folder = write(tmp_path / "m", module_tensors(scheme, "pack-quantized", torch.float32), scheme, "pack-quantized")
    entry = scheme.quantization_config(targets=["Linear"])
    entry["config_groups"]["group_0"]["targets"] = targets
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(SpecError, match=message):
        dequantized(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("entry", "message", "shown"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantized \(int4, gptq\), which is not read", "int4, gptq"),
        ({"quant_method": "awq", "bits": 4}, r"quantized \(int4, awq\)", "int4, awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4, bitsandbytes", "int4, bitsandbytes"),
        ({"quant_method": "fp8"}, r"quantized \(fp8\)", "fp8"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, entry, message, shown):
    folder = write(tmp_path / "m", {}, Scheme(4, 32), "pack-quantized")
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    ckpt = open_checkpoint(folder)
    with pytest.raises(RequirementError, match=message) as caught:
        dequantized(ckpt)
    assert "float checkpoint" in caught.value.hint
    assert describe(ckpt) == shown


def test_forms_that_are_not_read_are_refused_by_name(tmp_path):
    scheme = Scheme(4, 32)
    tensors = module_tensors(scheme, "pack-quantized", torch.float32)
    folder = write(tmp_path / "m", tensors, scheme, "marlin-24")
    with pytest.raises(RequirementError, match="format 'marlin-24' is not read"):
        dequantized(open_checkpoint(folder))
    entry = scheme.quantization_config()
    entry["config_groups"]["group_0"]["weights"] |= {"type": "float", "num_bits": 4}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(RequirementError, match=r"blocks\.0\.lin: .* type 'float'"):
        dequantized(open_checkpoint(folder))
    entry = scheme.quantization_config() | {"transform_config": {"config_groups": {}, "x": 1}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(RequirementError, match="rotated"):
        dequantized(open_checkpoint(folder))


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    scheme = Scheme(4, 32, False)
    tensors = module_tensors(scheme, "pack-quantized", torch.float32)
    lacking = {k: v for k, v in tensors.items() if k != "weight_zero_point"}
    with pytest.raises(SpecError, match=r"blocks\.0\.lin: weight_zero_point is missing"):
        dequantized(open_checkpoint(write(tmp_path / "a", lacking, scheme, "pack-quantized")))
    wrong = tensors | {"weight_packed": tensors["weight_packed"][:, :-1].contiguous()}
    with pytest.raises(SpecError, match=r"weight_packed is I32\[20, 11\]; expected I32\[20, 12\]"):
        dequantized(open_checkpoint(write(tmp_path / "b", wrong, scheme, "pack-quantized")))
    lacking = {k: v for k, v in tensors.items() if k != "weight_scale"}
    with pytest.raises(SpecError, match="no weight_scale beside it"):
        dequantized(open_checkpoint(write(tmp_path / "c", lacking, scheme, "pack-quantized")))


def test_quantized_activations_are_warned_of(tmp_path):
    scheme = Scheme(8)
    folder = write(tmp_path / "m", module_tensors(scheme, "int-quantized", torch.float32), scheme, "int-quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantized input_activations" in dequantized(open_checkpoint(folder)).warnings[0]


def test_model_dtype():
    assert model_dtype({"torch_dtype": "float16"}) is DType.F16
    assert model_dtype({"dtype": "bfloat16", "torch_dtype": "float16"}) is DType.BF16
    assert model_dtype({"torch_dtype": "auto"}) is None
    assert model_dtype({}) is None
