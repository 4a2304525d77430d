"""Quantizing a block at a time by learning: which outputs are aimed at, resuming, and what else is in the block."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import vocab_world
from interruption import stopped_in_block

import llmkit
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText, token_ids, windows
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.decoder import load_decoder
from llmkit.errors import InputError, RequirementError
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.transforms.quantize import quantize

TEXT = CalibrationText("english", "\n".join(vocab_world.ENGLISH) * 4)
SAMPLES = Samples(TEXT, n=12, length=24, seed=1)


def learnt(ckpt, iterations=30, samples=SAMPLES, **more):
    given = {"bits": 3, "group_size": "channel", "symmetric": False, "method": "signround"} | more
    return quantize(ckpt, quantizer=CalibratedQuantizer(ckpt, samples), iterations=iterations, **given)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_model_is_nearer_than_where_it_began(tmp_path, model, family):
    base = model(family)
    ids = torch.tensor(windows(token_ids(TEXT, load_tokenizer(base)), 24))
    whole = load_decoder(base)(ids)
    errors = {}
    for iterations in (0, 60):
        llmkit.save(learnt(base, iterations), tmp_path / f"q{iterations}")
        found = load_decoder(llmkit.open_checkpoint(tmp_path / f"q{iterations}"))(ids)
        errors[iterations] = float((found - whole).square().mean())
    assert errors[60] < 0.9 * errors[0]


def test_from_gptq_without_iterations_is_gptq(tmp_path, model, monkeypatch):
    """With products in float32: the outputs of a block that is learnt are computed again, exactly."""
    monkeypatch.setattr("llmkit.calibration.products.product_dtype", lambda device: None)
    base = model()
    for name, more in {"a": {"method": "gptq", "iterations": None}, "b": {"method": "gptq-signround"}}.items():
        llmkit.save(learnt(base, **({"iterations": 0} | more)), tmp_path / name)
    made = [llmkit.open_checkpoint(tmp_path / name).tensors for name in "ab"]
    for name, lazy in made[0].items():
        torch.testing.assert_close(made[1][name].load(), lazy.load(), rtol=0, atol=0)


@pytest.mark.parametrize("block", [0, 1])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path, model, monkeypatch, block):
    base = model()
    llmkit.save(learnt(base, 8), tmp_path / "whole")
    noted = stopped_in_block(monkeypatch, str(block))
    with pytest.raises(KeyboardInterrupt):
        llmkit.save(learnt(base, 8), tmp_path / "q")
    llmkit.save(learnt(base, 8), tmp_path / "q")
    # The text comes before the blocks.
    assert len(noted) == block + 2 + (len(base.require_model().blocks) - block)
    name = "model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_seed_and_other_iterations_are_other_work(tmp_path, model):
    base = model()
    given = {"a": {}, "b": {"samples": replace(SAMPLES, seed=2)}, "c": {"iterations": 31}}
    found = {}
    for name, more in given.items():
        llmkit.save(learnt(base, **more), tmp_path / name)
        found[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert len(set(found.values())) == 3
    assert llmkit.open_checkpoint(tmp_path / "c").history[-1]["iterations"] == 31


def test_a_block_with_weights_of_another_method(tmp_path, model):
    """GPTQ settles its weights first; the others are learnt for a block that has them."""
    base = model()

    class Both(CalibratedQuantizer):
        def __call__(self, task):
            return super().__call__(replace(task, method=GPTQ) if "down_proj" in task.name else task)

    ids = torch.tensor(windows(token_ids(TEXT, load_tokenizer(base)), 24))
    whole, errors = load_decoder(base)(ids), {}
    for n in (0, 60):
        quantizer = Both(base, SAMPLES)
        made = quantize(base, bits=4, group_size="channel", method="signround", quantizer=quantizer, iterations=n)
        llmkit.save(made, tmp_path / f"q{n}")
        errors[n] = float((load_decoder(llmkit.open_checkpoint(tmp_path / f"q{n}"))(ids) - whole).square().mean())
    assert errors[60] < 0.9 * errors[0]
    name = "model.layers.0.mlp.down_proj.weight_packed"
    tensors = [llmkit.open_checkpoint(tmp_path / f"q{n}").tensors[name].load() for n in errors]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_the_plan_tells_the_time_of_learning(model):
    base = model()
    said = {n: "\n".join(learnt(base, n).notes) for n in (10**8, 2 * 10**8)}
    minutes = {n: int(re.search(r"learning takes about (\d+) min", notes)[1]) for n, notes in said.items()}
    assert minutes[2 * 10**8] == pytest.approx(2 * minutes[10**8], abs=1)
    plain = quantize(base, bits=4, group_size="channel", method="gptq", quantizer=CalibratedQuantizer(base, SAMPLES))
    assert not any("learning" in note for note in plain.notes)


def test_what_it_is_asked_for(model):
    base = model()
    with pytest.raises(RequirementError, match="--method signround needs squares of the inputs"):
        quantize(base, bits=4, method="signround")
    with pytest.raises(InputError, match="--method gptq does not learn in iterations"):
        learnt(base, method="gptq")
