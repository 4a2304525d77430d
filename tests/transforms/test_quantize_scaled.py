"""Quantizing with scaled inputs: what is written belongs together; resuming; what is left alone."""

from __future__ import annotations

from pathlib import Path

import family_world as world
import pytest
import torch
import vocab_world
from interruption import stopped_in_block

import llmkit
from llmkit.calibration.observe import observe
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.ranks import Ranks
from llmkit.calibration.samples import Samples
from llmkit.calibration.stored import StoredQuantizer
from llmkit.calibration.texts import CalibrationText, read_text, token_ids, windows
from llmkit.checkpoint.quantized import dequantized
from llmkit.checkpoint.statistics import open_statistics
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.decoder import load_decoder
from llmkit.errors import InputError, RequirementError
from llmkit.tensors.constant import constant
from llmkit.transforms.quantize import quantize

TEXT = CalibrationText("english", ("\n".join(vocab_world.ENGLISH) * 4,))
SAMPLES = Samples(TEXT, n=8, length=24, seed=1)
FAMILIES = ["falcon", "gpt_neox", "gpt2", "rwkv", "opt", "phi3", "minicpm3"]
MINI = Path(__file__).resolve().parents[2] / "evalsets/mini"


def scaled(ckpt, samples=SAMPLES, **more):
    given = {"bits": 4, "group_size": 16, "symmetric": False, "method": "awq"} | more
    return quantize(ckpt, quantizer=CalibratedQuantizer(ckpt, samples), **given)


def norms(ckpt):
    return {name: t.load() for name, t in ckpt.tensors.items() if "norm" in name or "ln_" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_weights_that_are_written_belong_together(tmp_path, model, family):
    """Eight bits lose next to nothing, whatever the scales are; a scale that one side lacks would lose everything."""
    base = model(family)
    ids = torch.tensor(windows(token_ids(TEXT, load_tokenizer(base)), 24)[:2])
    layout = "gptq" if family in ("gpt2", "opt") else "compressed-tensors"
    method = "awq-gptq" if family == "phi3" else "awq"
    llmkit.save(scaled(base, bits=8, format=layout, method=method), tmp_path / "q")
    made = llmkit.open_checkpoint(tmp_path / "q")
    whole, found = load_decoder(base)(ids), load_decoder(made)(ids)
    assert (found - whole).square().mean() < 1e-3 * whole.square().mean()
    changed = [name for name, tensor in norms(base).items() if not torch.equal(made.tensors[name].load(), tensor)]
    assert (len(changed) > 0) == (family != "rwkv"), changed


def test_transformers_computes_what_llmkit_does(tmp_path, model):
    llmkit.save(scaled(model(), symmetric=True), tmp_path / "q")  # transformers 4 reads no zero points
    llmkit.save(dequantized(llmkit.open_checkpoint(tmp_path / "q")), tmp_path / "restored")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        theirs, restored = (world.by_transformers(tmp_path / n, "eager")(ids).logits for n in ("q", "restored"))
    torch.testing.assert_close(theirs, restored, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs, load_decoder(llmkit.open_checkpoint(tmp_path / "q"))(ids), atol=1e-4, rtol=0)


def test_the_trained_model_is_nearer_than_without_scales(tmp_path):
    base = llmkit.open_checkpoint(MINI / "base")
    samples = Samples(read_text(MINI / "text.txt"), n=32, length=64)
    ids = torch.tensor(windows(token_ids(samples.text, load_tokenizer(base)), 64, samples=8, seed=3))
    whole = load_decoder(base)(ids).log_softmax(-1)
    lost = {}
    for method in ("mse", "awq", "awq-gptq"):
        llmkit.save(scaled(base, samples, bits=3, group_size="channel", method=method), tmp_path / method)
        found = load_decoder(llmkit.open_checkpoint(tmp_path / method))(ids).log_softmax(-1)
        lost[method] = float((whole.exp() * (whole - found)).sum(-1).mean())
    assert lost["awq-gptq"] < 0.7 * lost["awq"] < 0.7 * 0.98 * lost["mse"], lost


def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path, model, monkeypatch):
    base, block = model("gpt_neox"), "1"
    llmkit.save(scaled(base), tmp_path / "whole")
    noted = stopped_in_block(monkeypatch, block)
    with pytest.raises(KeyboardInterrupt):
        llmkit.save(scaled(base), tmp_path / "q")
    llmkit.save(scaled(base), tmp_path / "q")
    assert noted[noted.index(block) + 1] == block
    name = "model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_kept_keeps_the_norm_before_it(tmp_path, model):
    """A layer in floats stays as it is: nothing that it reads is scaled. The plan names what has no scale."""
    base = model()
    kept = scaled(base, keep=["*.k_proj", "*.up_proj"])
    llmkit.save(kept, tmp_path / "q")
    found = llmkit.open_checkpoint(tmp_path / "q")
    for name, tensor in norms(base).items():
        assert torch.equal(found.tensors[name].load(), tensor), name
    words = " ".join(kept.notes)
    assert "without a scale, as nothing before them takes it off: model.layers.0.mlp.down_proj.weight" in words
    assert "without a scale" not in " ".join(scaled(base).notes)


def test_statistics_of_a_file_do_not_suffice(tmp_path, model):
    base = model()
    llmkit.save(observe(base, SAMPLES, "s.safetensors", has_moments=True), tmp_path / "s.safetensors")
    quantizer = StoredQuantizer(base, open_statistics(tmp_path / "s.safetensors", base))
    with pytest.raises(RequirementError, match="--method awq takes scales off in the layers before"):
        quantize(base, bits=4, group_size=16, method="awq", quantizer=quantizer)


def test_weights_that_are_no_numbers_are_named(tmp_path, model):
    base, name = model(), "model.layers.0.mlp.up_proj.weight"
    bad = base.tensors[name].load()
    bad[0, 0] = float("nan")
    broken = base.derive(tensors={**base.tensors, name: constant(bad)})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: the weights hold NaN"):
        llmkit.save(scaled(broken), tmp_path / "q")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "2 processes share the windows"),
        ("awq", "2 processes share the windows, but the first alone computes blocks with scaled inputs"),
        ("signround", "2 processes share the windows, but the first alone computes what is learnt"),
    ],
)
def test_the_plan_says_what_processes_do_not_share(tmp_path, method, words):
    base = llmkit.open_checkpoint(world.written(tmp_path / "m", "llama", None))
    quantizer = CalibratedQuantizer(base, SAMPLES, ranks=Ranks(0, 2))
    quantize(base, bits=4, group_size="channel", method=method, quantizer=quantizer)
    assert words in quantizer.words().split("; ")
