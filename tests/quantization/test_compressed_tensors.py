"""Restored weights equal compressed-tensors' own decompression, bit for bit, whole and in row slices."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe, model_dtype
from llmkit.errors import RequirementError, SpecError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.packing import pack_words
from llmkit.tensors.lazy import Context
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType
from tests.quantization.lazies import LIBRARY_HAS_GAPS, entry_of

BITS = (4, 8) if LIBRARY_HAS_GAPS else (3, 4, 8)
GRIDS = [Grid(b, g, s) for b in BITS for g in (None, 32) for s in (True, False)]


def module_tensors(grid: Grid, layout: str, dtype: torch.dtype, shape=(20, 96)) -> dict[str, torch.Tensor]:
    """One quantized layer with random grid points: what any tool may have written."""
    generator = torch.Generator().manual_seed(1)
    groups = grid.n_groups(shape[1])
    low, high = -grid.middle, grid.middle
    q = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
    zero = torch.randint(low, high, (shape[0], groups), dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], groups, generator=generator).add(0.1).to(dtype)
    tensors = {"weight_scale": scale}
    if layout == "pack-quantized":
        tensors |= {
            "weight_packed": pack_words((q.short() + grid.middle).to(torch.uint8), grid.bits),
            "weight_shape": torch.tensor(shape),
        }
        zero = pack_words((zero.t().short() + grid.middle).to(torch.uint8), grid.bits).t().contiguous()
    else:
        tensors["weight"] = q
    return tensors if grid.is_symmetric else tensors | {"weight_zero_point": zero}


def write(folder: Path, tensors: dict[str, torch.Tensor], grid: Grid, layout: str, **config) -> Path:
    entry = entry_of(grid)
    entry["format"] = layout
    folder.mkdir(exist_ok=True)
    save_file(
        {f"blocks.0.lin.{k}": v for k, v in tensors.items()} | {"emb": torch.ones(3, 2)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry, **config}))
    return folder


def by_library(tensors: dict[str, torch.Tensor], grid: Grid, layout: str) -> torch.Tensor:
    weights = entry_of(grid)["config_groups"]["group_0"]["weights"]
    theirs = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    return BaseCompressor.get_value_from_registry(layout).decompress(dict(tensors), theirs)["weight"]


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "naive-quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_librarys_decompression(tmp_path, grid, dtype, layout):
    tensors = module_tensors(grid, layout, dtype)
    ckpt = dequantized(open_checkpoint(write(tmp_path / "m", tensors, grid, layout)))
    assert list(ckpt.tensors) == ["blocks.0.lin.weight", "emb"]
    lazy = ckpt.tensors["blocks.0.lin.weight"]
    expected = by_library(tensors, grid, layout)
    assert torch.equal(lazy.load(), expected)
    assert lazy.load().dtype == dtype
    step = lazy.node.row_step
    is_packed = layout == "pack-quantized" and not grid.is_symmetric
    assert step == ((32 // grid.bits if 32 % grid.bits == 0 else None) if is_packed else 1)
    if step is not None:
        parts = [Context().rows(lazy, (a, min(a + 8, 20))) for a in range(0, 20, 8)]
        assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("grid", [Grid(4, None, False), Grid(8, None, True)], ids=str)
def test_rows_that_do_not_fill_their_words(tmp_path, grid):
    tensors = module_tensors(grid, "pack-quantized", torch.float32, (10, 37))
    ckpt = dequantized(open_checkpoint(write(tmp_path / "m", tensors, grid, "pack-quantized")))
    loaded = ckpt.tensors["blocks.0.lin.weight"].load()
    assert loaded.shape == (10, 37)
    assert torch.equal(loaded, by_library(tensors, grid, "pack-quantized"))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_models_dtype_wins_over_that_of_the_scales(tmp_path, key):
    """transformers casts the scales to the model's dtype when it loads them."""
    grid = Grid(4, 32, False)
    tensors = module_tensors(grid, "pack-quantized", torch.float32)
    folder = write(tmp_path / "m", tensors, grid, "pack-quantized", **{key: "bfloat16"})
    tensors["weight_scale"] = tensors["weight_scale"].to(torch.bfloat16)
    expected = by_library(tensors, grid, "pack-quantized")
    ckpt = open_checkpoint(folder)
    assert torch.equal(dequantized(ckpt).tensors["blocks.0.lin.weight"].load(), expected)
    assert dequantized(ckpt, dtype=DType.F32).tensors["blocks.0.lin.weight"].dtype is DType.F32


def test_act_order_uses_the_group_of_each_column(tmp_path):
    grid = Grid(4, 32, False)
    tensors = module_tensors(grid, "int-quantized", torch.float32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2)) // 32
    q, scale, zero = tensors["weight"].float(), tensors["weight_scale"], tensors["weight_zero_point"].float()
    expected = (q - zero[:, order]) * scale[:, order]
    packed = module_tensors(grid, "pack-quantized", torch.float32) | {"weight_g_idx": order.int()}
    ckpt = dequantized(open_checkpoint(write(tmp_path / "m", packed, grid, "pack-quantized")))
    assert torch.equal(ckpt.tensors["blocks.0.lin.weight"].load(), expected)


def test_nothing_is_read_until_a_tensor_is_loaded(tmp_path, monkeypatch):
    grid = Grid(4, 32, False)
    folder = write(tmp_path / "m", module_tensors(grid, "pack-quantized", torch.float32), grid, "pack-quantized")
    monkeypatch.setattr(SourceFile, "read_tensor", lambda *_: pytest.fail("read"))
    assert dequantized(open_checkpoint(folder)).tensors["blocks.0.lin.weight"].shape == (20, 96)


def test_config_of_the_float_model_and_a_float_checkpoint_as_it_is(tmp_path):
    grid = Grid(8)
    folder = write(tmp_path / "m", module_tensors(grid, "pack-quantized", torch.float32), grid, "pack-quantized", a=1)
    floats = dequantized(open_checkpoint(folder))
    assert floats.config == {"a": 1}
    assert dequantized(floats) is floats


def test_groups_with_other_grids_and_names(tmp_path):
    a, b = Grid(4, 32), Grid(8)
    tensors = {f"x.first.{k}": v for k, v in module_tensors(a, "pack-quantized", torch.float32).items()}
    tensors |= {f"x.second.{k}": v for k, v in module_tensors(b, "pack-quantized", torch.float32).items()}
    entry = entry_of(a)
    entry["config_groups"]["group_1"] = entry_of(b)["config_groups"]["group_0"] | {"targets": ["re:.*second$"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file(tensors, tmp_path / "model.safetensors")
    ckpt = open_checkpoint(tmp_path)
    floats = dequantized(ckpt)
    for name, grid in (("first", a), ("second", b)):
        expected = by_library(module_tensors(grid, "pack-quantized", torch.float32), grid, "pack-quantized")
        assert torch.equal(floats.tensors[f"x.{name}.weight"].load(), expected)
    assert describe(ckpt) == "int4 group 32 symmetric, int8 per channel symmetric, compressed-tensors"


@pytest.mark.parametrize(
    ("targets", "message"),
    [(7, "no config group has it"), (None, "no config group has it"), (["re:("], "a target is no regular expression")],
)
def test_targets_of_other_types_are_refused(tmp_path, targets, message):
    grid = Grid(4, 32)
    folder = write(tmp_path / "m", module_tensors(grid, "pack-quantized", torch.float32), grid, "pack-quantized")
    entry = entry_of(grid)
    entry["config_groups"]["group_0"]["targets"] = targets
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(SpecError, match=message):
        dequantized(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("entry", "message", "shown"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantized \(int4, gptq\) by .* only: no tensor", "int4, gptq"),
        ({"quant_method": "awq", "bits": 4}, r"quantized \(int4, awq\)", "int4, awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4, bitsandbytes", "int4, bitsandbytes"),
        ({"quant_method": "fp8"}, r"quantized \(fp8\)", "fp8"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path, entry, message, shown):
    folder = write(tmp_path / "m", {}, Grid(4, 32), "pack-quantized")
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    ckpt = open_checkpoint(folder)
    with pytest.raises(RequirementError, match=message) as caught:
        dequantized(ckpt)
    assert "float checkpoint" in caught.value.hint
    assert describe(ckpt) == shown


def test_forms_that_are_not_read_are_refused_by_name(tmp_path):
    grid = Grid(4, 32)
    tensors = module_tensors(grid, "pack-quantized", torch.float32)
    folder = write(tmp_path / "m", tensors, grid, "marlin-24")
    with pytest.raises(RequirementError, match="format 'marlin-24' is not read"):
        dequantized(open_checkpoint(folder))
    entry = entry_of(grid)
    entry["config_groups"]["group_0"]["weights"] |= {"type": "float", "num_bits": 4}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(RequirementError, match=r"blocks\.0\.lin: .* type 'float'"):
        dequantized(open_checkpoint(folder))
    entry = entry_of(grid) | {"transform_config": {"config_groups": {}, "x": 1}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    with pytest.raises(RequirementError, match="rotated"):
        dequantized(open_checkpoint(folder))


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    grid = Grid(4, 32, False)
    tensors = module_tensors(grid, "pack-quantized", torch.float32)
    lacking = {k: v for k, v in tensors.items() if k != "weight_zero_point"}
    with pytest.raises(SpecError, match=r"blocks\.0\.lin: weight_zero_point is missing"):
        dequantized(open_checkpoint(write(tmp_path / "a", lacking, grid, "pack-quantized")))
    wrong = tensors | {"weight_packed": tensors["weight_packed"][:, :-1].contiguous()}
    with pytest.raises(SpecError, match=r"weight_packed is I32\[20, 11\]; expected I32\[20, 12\]"):
        dequantized(open_checkpoint(write(tmp_path / "b", wrong, grid, "pack-quantized")))
    lacking = {k: v for k, v in tensors.items() if k != "weight_scale"}
    with pytest.raises(SpecError, match="no weight_scale beside it"):
        dequantized(open_checkpoint(write(tmp_path / "c", lacking, grid, "pack-quantized")))
    n_in = int(tensors["weight_shape"][1])
    strange = tensors | {"weight_g_idx": torch.full((n_in,), 99, dtype=torch.int32)}
    with pytest.raises(SpecError, match=r"blocks\.0\.lin: g_idx has groups 99 to 99; expected 0 to"):
        dequantized(open_checkpoint(write(tmp_path / "d", strange, grid, "pack-quantized")))


def test_quantized_activations_are_warned_of(tmp_path):
    grid = Grid(8)
    folder = write(tmp_path / "m", module_tensors(grid, "int-quantized", torch.float32), grid, "int-quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantized input_activations" in dequantized(open_checkpoint(folder)).warnings[0]


def test_model_dtype():
    assert model_dtype({"torch_dtype": "float16"}) is DType.F16
    assert model_dtype({"dtype": "bfloat16", "torch_dtype": "float16"}) is DType.BF16
    assert model_dtype({"torch_dtype": "auto"}) is None
    assert model_dtype({}) is None


def test_the_older_key_of_the_config_is_read_everywhere(tmp_path):
    """Before 0.4 compressed-tensors wrote `compression_config`, without a quant_method."""
    from llmkit.api import save
    from llmkit.transforms.convert.convert import convert
    from llmkit.transforms.quantize import quantize
    from tests.transforms.test_quantize import write_model

    write_model(tmp_path / "float")
    save(quantize(open_checkpoint(tmp_path / "float"), bits=4), tmp_path / "q")
    floats = dequantized(open_checkpoint(tmp_path / "q")).tensors
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    entry = config.pop("quantization_config")
    del entry["quant_method"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"compression_config": entry}))
    ckpt = open_checkpoint(tmp_path / "q")
    assert describe(ckpt) == "int4 group 32 asymmetric, compressed-tensors"
    save(convert(ckpt, to="hf"), tmp_path / "same")  # as it is
    assert "compression_config" in json.loads((tmp_path / "same" / "config.json").read_text())
    save(convert(ckpt, to="hf", dtype="float32"), tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert "compression_config" not in back.config
    assert all(torch.equal(back.tensors[name].load(), lazy.load()) for name, lazy in floats.items())
