"""Weights restored of what AutoRound packed are its own, bit for bit, whichever layout it borrowed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import RequirementError
from llmkit.tensors.spec import DType
from tests.goldens import GOLDEN

RECORDED = GOLDEN / "quantized" / "auto_round.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(RECORDED)


def opened(path, recorded, case, form, **more):
    save_file({k: v for k, v in recorded.items() if k.startswith(f"{case}.")}, path / "model.safetensors")
    entry = {"quant_method": "auto-round", "bits": int(case[-1]), "group_size": 32, "data_type": "int"}
    entry |= {"sym": case.startswith("minus"), "packing_format": form, **more}
    (path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    (path / "quantization_config.json").write_text(json.dumps(entry))
    return open_checkpoint(path)


@pytest.mark.parametrize(
    ("case", "form", "method"),
    [
        ("plain2", "auto_round", "auto-round"),
        ("plain3", "auto_round:gptqmodel", "auto-round"),
        ("plain4", "auto_round", "intel/auto-round"),
        ("minus3", "auto_round:auto_gptq", "auto-round"),
        ("minus4", "auto_round:gptq:exllamav2", "auto-round"),
    ],
)
def test_equals_the_library(tmp_path, recorded, case, form, method):
    floats = dequantized(opened(tmp_path, recorded, case, form, quant_method=method), dtype=DType.F16)
    expected = recorded[f"expected.{case}"].half()  # 3 bits are multiplied in float16, the others in float32
    assert torch.equal(floats[f"{case}.weight"].load()[[0, -1]], expected)
    assert "quantization_config" not in floats.config
    assert "quantization_config.json" not in floats.files


def test_a_form_that_is_not_read_is_named(tmp_path, recorded):
    with pytest.raises(RequirementError, match=r"'auto_round:mlx' of AutoRound .* is not read; expected auto_round"):
        dequantized(opened(tmp_path, recorded, "minus4", "auto_round:mlx"))
