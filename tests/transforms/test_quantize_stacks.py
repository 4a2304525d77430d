"""A family whose float files have experts in stacks, and whose quantized ones have them one by one (Llama 4)."""

from __future__ import annotations

import family_world as world
import pytest
import torch
import transformers
import vocab_world

from llmkit.api import save
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.load import load_decoder
from llmkit.inspection.comparison import compare
from llmkit.quantization.codec import folder_codec
from llmkit.transforms.convert import convert
from llmkit.transforms.layers import spelled_for
from llmkit.transforms.quantize import quantize
from llmkit.transforms.recipe import Scheme

IDS = torch.arange(3, 27).view(2, 12)
SAMPLES = Samples(CalibrationText("english", ("\n".join(vocab_world.ENGLISH) * 4,)), n=4, length=24, seed=1)
EXPERT = "feed_forward.experts.2.gate_proj.weight_packed"


@pytest.fixture
def base(tmp_path):
    return open_checkpoint(world.written(tmp_path / "base", "llama4", None))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_matrices_are_read_by_transformers(tmp_path, base, method):
    ckpt = spelled_for(base, folder_codec("compressed-tensors"))
    assert spelled_for(ckpt, folder_codec("compressed-tensors")).specs == ckpt.specs
    quantizer = CalibratedQuantizer(ckpt, SAMPLES)
    save(quantize(ckpt, bits=4, group_size="channel", method=method, quantizer=quantizer), tmp_path / "q")
    ours = load_decoder(open_checkpoint(tmp_path / "q"))(IDS)
    with torch.no_grad():
        theirs = world.by_transformers(tmp_path / "q", "eager")(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_codes_stay_and_floats_are_stacked_again(tmp_path, base):
    save(quantize(base, bits=4, group_size="channel", method="rtn"), tmp_path / "q")
    quantized = open_checkpoint(tmp_path / "q")
    assert f"model.layers.1.{EXPERT}" in quantized.tensors
    save(convert(quantized, to="compressed-tensors"), tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert set(again.tensors) == set(quantized.tensors)
    assert all(torch.equal(again.tensors[name].load(), t.load()) for name, t in quantized.tensors.items())
    save(convert(quantized, to="dense"), tmp_path / "floats")
    floats = open_checkpoint(tmp_path / "floats")
    assert (set(floats.tensors), compare(floats, quantized).beyond(0.0)) == (set(base.tensors), [])
    with torch.no_grad():
        theirs = world.by_transformers(tmp_path / "floats", "eager")(IDS).logits
    torch.testing.assert_close(load_decoder(quantized)(IDS), theirs, atol=1e-5, rtol=1e-5)


def test_a_layout_whose_reader_keeps_the_stacks_has_them(base):
    held = quantize(base, bits=4, group_size="channel", only=["*self_attn*"], method="rtn", format="gptq").tensors
    assert "model.layers.1.feed_forward.experts.gate_up_proj" in held
    assert not any("experts.2" in name for name in held)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_experts_that_stay_in_floats_are_said(tmp_path, family):
    ckpt = open_checkpoint(world.written(tmp_path / "base", family, None))
    n_all, n_stacked = (sum(t.spec.numel for t in ckpt.tensors.values() if len(t.shape) >= least) for least in (1, 3))
    (said,) = [note for note in quantize(ckpt, bits=8, method="rtn").notes if "stacks" in note]
    assert said.startswith(f"experts in stacks stay in floats, {n_stacked / n_all:.0%} of all weights")


def test_stacks_that_only_names_are_said_without_a_plugin(tmp_path):
    """JetMoe, which no plugin describes: of its experts only the router is a matrix."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "kv_channels": 8, "intermediate_size": 64}
    config = transformers.JetMoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    model = transformers.JetMoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    quantized = quantize(open_checkpoint(tmp_path / "base"), bits=8, only=["*mlp*"], method="rtn")
    assert any("stay in floats" in note and "mlp.input_linear.weight" in note for note in quantized.notes)
    save(quantized, tmp_path / "q")
    with torch.no_grad():
        theirs = world.by_transformers(tmp_path / "q", "eager")(IDS).logits
    assert (theirs - model(IDS).logits).abs().max() < 1e-2


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="experts are dequantized by transformers 5")
@pytest.mark.parametrize("n_experts", [2, 8])
def test_experts_on_a_grid_of_their_own_are_read_by_transformers(tmp_path, n_experts):
    """Whether there are more of them than other layers or fewer."""
    architecture = world.ARCHITECTURES["qwen3_moe"]
    sizes = {"num_experts": n_experts, "num_experts_per_tok": 1, "mlp_only_layers": [0]}
    base = random_checkpoint(architecture, architecture.tiny_config() | sizes)
    quantized = quantize(base, bits=4, group_size="channel", method="rtn", recipe={"*experts*": Scheme(8, "channel")})
    save(quantized, tmp_path / "q")
    ours = load_decoder(open_checkpoint(tmp_path / "q"))(IDS)
    with torch.no_grad():
        theirs = world.by_transformers(tmp_path / "q", "eager")(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    mixed = quantize(base, bits=4, group_size="channel", method="rtn", recipe={"*down*": Scheme(8, "channel")})
    assert any("reads all experts by one grid, and these have int4" in note for note in mixed.notes)
