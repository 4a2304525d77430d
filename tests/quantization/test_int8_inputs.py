"""Weights and inputs in int8 (W8A8): what is written is what compressed-tensors writes, reads and runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmkit
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import InputError
from llmkit.transforms.quantize import quantize
from tests.transforms.test_quantize import hf_logits, write_model

NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("w8a8")
    write_model(folder / "m", torch.bfloat16, ffn=100)
    made = quantize(llmkit.open_checkpoint(folder / "m"), bits=8, activations="int8", method="rtn")
    llmkit.save(made, folder / "q")
    return folder


def test_the_tensors_are_the_librarys(world):
    """Its own arithmetic gives the same codes from the same scales, and reads them as the same scheme."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize

    stored, floats = load_file(world / "q" / "model.safetensors"), load_file(world / "m" / "model.safetensors")
    entry = llmkit.open_checkpoint(world / "q").config["quantization_config"]
    config = QuantizationConfig.model_validate(entry)
    assert (config.format, config.ignore) == ("int-quantized", ["lm_head"])
    (group,) = config.config_groups.values()
    assert QuantizationStrategy(group.input_activations.strategy) is QuantizationStrategy.TOKEN
    assert group.input_activations.dynamic is True
    assert QuantizationStrategy(group.weights.strategy) is QuantizationStrategy.CHANNEL
    scales = stored[f"{NAME}.weight_scale"]
    assert (tuple(scales.shape), scales.dtype) == ((64, 1), torch.bfloat16)
    assert torch.equal(scales, (floats[f"{NAME}.weight"].float().abs().amax(1, keepdim=True) / 127.5).bfloat16())
    theirs = library_quantize(
        floats[f"{NAME}.weight"].float(), scales.float(), torch.zeros_like(scales, dtype=torch.int8), group.weights,
        dtype=torch.int8,
    )  # fmt: skip
    assert torch.equal(stored[f"{NAME}.weight"], theirs)


def test_transformers_restores_the_weights(world, tmp_path):
    llmkit.save(dequantized(llmkit.open_checkpoint(world / "q")), tmp_path / "restored")
    assert torch.equal(hf_logits(world / "q"), hf_logits(tmp_path / "restored"))


def test_what_it_cannot_be(world):
    ckpt = llmkit.open_checkpoint(world / "m")
    with pytest.raises(InputError, match="--bits 4: expected 8"):
        quantize(ckpt, bits=4, activations="int8")
    with pytest.raises(InputError, match="--group-size 64: expected"):
        quantize(ckpt, bits=8, group_size=64, activations="int8")
    with pytest.raises(InputError, match="--activations int8: gptq says nothing of the inputs of layers"):
        quantize(ckpt, bits=8, activations="int8", format="gptq")
    with pytest.raises(InputError, match="--activations int4: expected int8"):
        quantize(ckpt, bits=8, activations="int4")
    with pytest.raises(InputError, match="--asymmetric: compressed-tensors has no zero points"):
        quantize(ckpt, bits=8, activations="int8", symmetric=False)


def test_what_rounded_inputs_change(tmp_path):
    """Without `run_compressed: false` compressed-tensors rounds the inputs: the logits are those of our weights so."""
    write_model(tmp_path / "m")
    llmkit.save(quantize(llmkit.open_checkpoint(tmp_path / "m"), bits=8, activations="int8"), tmp_path / "q")
    llmkit.save(dequantized(llmkit.open_checkpoint(tmp_path / "q")), tmp_path / "restored")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"].pop("run_compressed", None)
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))

    def round_inputs(_module, inputs):
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(round_inputs)
    with torch.no_grad():
        rounded = model(torch.arange(24).view(2, 12)).logits
    exact, theirs = hf_logits(tmp_path / "restored"), hf_logits(tmp_path / "q")
    torch.testing.assert_close(theirs, rounded, atol=1e-4, rtol=0)
    assert 1e-3 < (theirs - exact).abs().max() < 0.1 * exact.abs().max()
