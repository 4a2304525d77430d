"""Weights on nf4, fp4 and float8: each method and layout takes them, or refuses in one line; loaders read them."""

from __future__ import annotations

import json

import pytest
import torch

import llmkit
from llmkit import entry_points
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.quantization.codec import FolderCodec, folder_readers
from llmkit.quantization.matrix import Grid, matrix_of
from llmkit.quantization.method import GROUP, method_named
from llmkit.quantization.points import FP8, NF4
from llmkit.tensors.lazy import Context
from llmkit.transforms.convert import convert
from llmkit.transforms.quantize import quantize
from llmkit.transforms.recipe import Scheme
from tests.transforms.test_quantize import hf_logits, write_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
FORMATS = [reader.name for reader in folder_readers() if isinstance(reader, FolderCodec)]
METHODS = [e.name for e in entry_points.entries(GROUP) if e.is_builtin]
BITS = {"int": 4, "nf4": 4, "fp4": 4, "fp8": 8}
HELD = {
    "int": [name for name in FORMATS if not name.startswith("bitsandbytes")],
    "nf4": ["bitsandbytes", "bitsandbytes_nested"],
    "fp4": ["bitsandbytes", "bitsandbytes_nested"],
    "fp8": ["compressed-tensors"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types") / "m"
    write_model(folder, torch.bfloat16, ffn=128, layers=1)
    return llmkit.open_checkpoint(folder)


def saved(ckpt, folder):
    llmkit.save(ckpt, folder)
    return llmkit.open_checkpoint(folder)


@pytest.mark.parametrize("type", BITS)
@pytest.mark.parametrize("format", FORMATS)
def test_each_layout_holds_a_type_or_says_why_not(model, tmp_path, type, format):
    """What is held is read again: the codes and the scales that were stored, of every matrix."""
    if format not in HELD[type]:
        with pytest.raises(InputError, match=f"--type {type}: {format} has |--bits 4: expected 8"):
            quantize(model, bits=BITS[type], type=type, format=format)
        return
    planned = quantize(model, bits=BITS[type], type=type, format=format)
    stored = saved(planned, tmp_path / "q")
    restored = dequantized(stored).tensors
    assert all(torch.equal(lazy.load(), restored[name].load()) for name, lazy in dequantized(planned).tensors.items())
    found = matrix_of(dequantized(stored)[Q_PROJ])
    assert (found.grid.points.name if found.grid.points else "int") == type
    error = (dequantized(stored)[Q_PROJ].load() - model[Q_PROJ].load()).float().norm() / model[Q_PROJ].load().norm()
    assert error < {"int": 0.12, "nf4": 0.12, "fp4": 0.15, "fp8": 0.04}[type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("type", "format"), [("nf4", "bitsandbytes"), ("fp8", "compressed-tensors")])
def test_each_method_takes_a_type_or_says_why_not(model, method, type, format):
    way = method_named(method, is_calibrated=None)
    if way.needs:
        points = next(p for p in (NF4, FP8) if p.name == type)
        why = way.refuses(Grid(BITS[type], None, points=points))
        assert (why is None) == way.takes_points == (method not in ("gptq-signround", "signround"))
        assert why is None or why == f"rounds to integers, and codes of {type} are none"
        with pytest.raises(RequirementError, match="needs"):
            quantize(model, bits=BITS[type], type=type, format=format, method=method)
    elif way.takes_points:
        made = quantize(model, bits=BITS[type], type=type, format=format, method=method)
        assert f"to {type}" in " ".join(made.notes)
    else:
        with pytest.raises(InputError, match=f"--method {method} rounds to integers, and codes of {type} are none"):
            quantize(model, bits=BITS[type], type=type, format=format, method=method)


def test_float8_is_rounded_as_compressed_tensors_does(model, tmp_path):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize as theirs
    from compressed_tensors.quantization.utils import calculate_qparams

    made = saved(quantize(model, bits=8, type="fp8", method="rtn"), tmp_path / "q")
    assert describe(made) == "float8 per channel symmetric, compressed-tensors"
    args = QuantizationArgs(num_bits=8, type="float", strategy=QuantizationStrategy.CHANNEL, symmetric=True)
    for name, lazy in model.tensors.items():
        if "_proj" not in name:
            continue
        weight, module = lazy.load().float(), name.removesuffix(".weight")
        low, high = weight.aminmax(dim=1, keepdim=True)
        scale, zero = calculate_qparams(low, high, args)
        stored = made[f"{module}.weight_scale"].load()
        assert torch.equal(stored, scale.to(stored.dtype))
        expected = theirs(weight, stored.float(), zero, args, dtype=torch.float8_e4m3fn)
        assert torch.equal(made[name].load().view(torch.uint8), expected.view(torch.uint8))


def test_float8_loads_in_transformers(model, tmp_path):
    """Unchanged, with the weights of llmkit; vLLM reads FP8_DYNAMIC from the names, shapes and dtypes."""
    made = saved(quantize(model, bits=8, type="fp8"), tmp_path / "q")
    llmkit.save(dequantized(made), tmp_path / "dense")
    assert torch.allclose(hf_logits(tmp_path / "q"), hf_logits(tmp_path / "dense"), atol=1e-3, rtol=0)
    group = made.config["quantization_config"]["config_groups"]["group_0"]
    weights, inputs = group["weights"], group["input_activations"]
    assert (weights["type"], weights["num_bits"], weights["strategy"], weights["dynamic"]) == (
        "float",
        8,
        "channel",
        False,
    )
    assert (inputs["type"], inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == ("float", 8, "token", True)
    assert str(made[Q_PROJ].spec) == "F8_E4M3[64, 64]"
    assert str(made[f"{Q_PROJ}_scale"].spec) == "BF16[64, 1]"
    assert made.config["quantization_config"]["format"] == "float-quantized"
    assert any("input_activations" in warning for warning in dequantized(made).warnings)


def test_float8_beside_integers(model, tmp_path):
    """A recipe gives single matrices another type, and the format of each group is stated."""
    made = saved(
        quantize(
            model, bits=4, symmetric=True, recipe={"*.down_proj": Scheme(type="FP8"), "lm_head": Scheme(type="FP8")}
        ),
        tmp_path / "q",
    )
    entry = made.config["quantization_config"]
    assert entry["format"] == "mixed-precision"
    assert sorted(g["format"] for g in entry["config_groups"].values()) == ["float-quantized", "pack-quantized"]
    grids = {name: matrix_of(lazy).grid for name, lazy in dequantized(made).tensors.items() if matrix_of(lazy)}
    assert {name for name, grid in grids.items() if grid.points} == {
        "lm_head.weight",
        "model.layers.0.mlp.down_proj.weight",
    }


@pytest.mark.parametrize(("format", "type"), [("bitsandbytes", "fp4"), ("bitsandbytes_nested", "nf4")])
def test_codes_stay_from_bitsandbytes_to_bitsandbytes(model, tmp_path, format, type):
    before = saved(quantize(model, bits=4, type=type, format=format), tmp_path / "a")
    after = saved(convert(before, to=format), tmp_path / "b")
    assert list(after.tensors) == list(before.tensors)
    assert all(torch.equal(lazy.load(), before[name].load()) for name, lazy in after.tensors.items())
    assert after.config == before.config
    plain = saved(convert(before, to="bitsandbytes"), tmp_path / "c")  # scales in floats hold those in 8 bits
    assert torch.equal(dequantized(plain)[Q_PROJ].load(), dequantized(before)[Q_PROJ].load())
    if format == "bitsandbytes":
        with pytest.raises(RequirementError, match="rounds scales to 8 bits"):
            convert(before, to="bitsandbytes_nested")
        assert (
            convert(before, to="bitsandbytes_nested", requantize=True)[f"{Q_PROJ}.absmax"].load().dtype is torch.uint8
        )
    with pytest.raises(RequirementError, match=f"gptq has no codes of {type}"):
        convert(before, to="gptq")


def test_rows_in_slices_are_those_of_the_whole(model):
    made = quantize(model, bits=8, type="fp8")
    lazy = dequantized(made)[Q_PROJ]
    cut = [Context().rows(lazy, rows) for rows in ((0, 5), (5, 40), (40, 64))]
    assert torch.equal(torch.cat(cut), lazy.load())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "type": "fp8"}, "--bits 4: fp8 has codes of 8 bits"),
        ({"bits": 8, "type": "fp8", "group_size": 64}, "--group-size 64: expected channel or auto"),
        ({"bits": 8, "type": "fp8", "symmetric": False}, "--asymmetric: fp8 has no zero points"),
        ({"bits": 3, "format": "bitsandbytes"}, "--bits 3: expected 4 or 8 in bitsandbytes"),
        ({"bits": 8, "format": "awq"}, "--bits 8: expected 4 in awq"),
        ({"bits": 4, "format": "bitsandbytes", "group_size": "channel"}, "--group-size channel: expected 32, 64"),
        ({"bits": 4, "type": "nf5"}, "--type nf5: compressed-tensors has int and fp8"),
        ({"bits": 4, "type": "int", "format": "bitsandbytes"}, "--bits 4: expected 8"),
        (
            {"bits": 4, "format": "bitsandbytes", "recipe": {"*.q_proj": Scheme(8)}},
            "bitsandbytes has 4 or 8 bits in all layers of a folder",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(model, options, message):
    with pytest.raises(LlmkitError, match=message):
        quantize(model, **options)


def test_bitsandbytes_states_what_transformers_reads(model):
    entry = quantize(model, bits=4, format="bitsandbytes").config["quantization_config"]
    assert (entry["load_in_4bit"], entry["bnb_4bit_quant_type"], entry["llm_int8_skip_modules"]) == (
        True,
        "nf4",
        ["lm_head"],
    )
    assert json.loads(json.dumps(entry)) == entry
