"""Statistics in a file are those of the decoder's inputs, in three formats, and weights are quantized by them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import llmkit
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.observe import observe
from llmkit.calibration.observers import Observer
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.samples import Samples
from llmkit.calibration.stored import StoredQuantizer
from llmkit.calibration.texts import CalibrationText
from llmkit.checkpoint.quantized import dequantized
from llmkit.checkpoint.statistics import open_statistics
from llmkit.decoder.load import load_blocks
from llmkit.errors import InputError, RequirementError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.gptq import FAST
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.quantization.methods.mse import METHOD as MSE
from llmkit.quantization.packing import unpack
from llmkit.tensors.constant import constant
from llmkit.transforms.quantize import quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))
import family_world as world
import vocab_world

TEXT = CalibrationText("english", "\n".join(vocab_world.ENGLISH) * 4)
SAMPLES = Samples(TEXT, n=12, length=24, seed=1)


class Recorder:
    def __init__(self):
        self.observers = {}

    def see(self, weights, x, float_x):
        for weight in weights:
            self.observers.setdefault(weight, Observer({"squares", "maxima", "second_moments"})).see(x)

    def settle(self, weights, values):
        return values


def measured(ckpt):
    """Statistics by weight, of the samples in one pass."""
    decoder, weights = load_blocks(ckpt)
    blocks = Blocks(decoder, weights, torch.tensor(SAMPLES.rows(ckpt, ckpt.prompt_suffix(), decoder.context)))
    recorder, hidden = Recorder(), blocks.embedded()
    for i in range(len(blocks)):
        hidden = blocks.run(i, hidden, recorder)
    return {weight: observer.statistics() for weight, observer in recorder.observers.items()}


@pytest.fixture
def model(tmp_path):
    return lambda family="llama": llmkit.open_checkpoint(world.written(tmp_path / family, family, None))


def linear(ckpt):
    return [slot for slot in ckpt.require_model().slots.values() if slot.kind == "linear" and slot.layer is not None]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom", "chatglm2"])
def test_the_file_holds_what_the_decoder_saw(tmp_path, model, family):
    ckpt = model(family)
    llmkit.save(observe(ckpt, SAMPLES, "s.safetensors", has_moments=True), tmp_path / "s.safetensors")
    found, expected = open_statistics(tmp_path / "s.safetensors", ckpt), measured(ckpt)
    assert {part.id for slot in linear(ckpt) for part in slot.parts} == set(found.parts)
    for slot in linear(ckpt):
        mine, theirs = found.of(slot), expected[slot.parts[0].id]
        assert mine.n_tokens == theirs.n_tokens == 12 * 24
        for field in ("squares", "maxima", "second_moments"):
            torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=1e-6, atol=1e-6)
    assert {"sha256": TEXT.digest, "samples": 12, "length": 24, "seed": 1}.items() <= found.about.items()


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_importance_matrices_have_the_means_under_the_names_of_gguf(tmp_path, model, family, suffix):
    ckpt = model(family)
    path = tmp_path / f"imatrix{suffix}"
    llmkit.save(observe(ckpt, SAMPLES, path.name), path)
    found, expected = open_statistics(path, ckpt), measured(ckpt)
    for slot in linear(ckpt):
        torch.testing.assert_close(found.of(slot).mean_squares, expected[slot.parts[0].id].mean_squares)
    if suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        tensors = {t.name: t for t in reader.tensors}
        sums = tensors["blk.1.ffn_down.weight.in_sum2"]
        np.testing.assert_allclose(sums.data[0], expected["layers.1.mlp.down.weight"].squares, rtol=1e-5)
        assert tensors["blk.1.ffn_down.weight.counts"].data.tolist() == [[12 * 24]]
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["general.type"] == "imatrix"
        assert fields["imatrix.datasets"] == ["english"]
        assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (12, 24)


@pytest.mark.parametrize("method", [MSE, GPTQ, FAST], ids=lambda m: m.name)
def test_weights_are_quantized_by_the_file_as_by_what_was_measured(tmp_path, model, method):
    ckpt = model()
    llmkit.save(observe(ckpt, SAMPLES, "s.safetensors", has_moments=True), tmp_path / "s.safetensors")
    quantizer = StoredQuantizer(ckpt, open_statistics(tmp_path / "s.safetensors", ckpt))
    made = quantize(ckpt, bits=4, group_size="channel", symmetric=False, method=method.name, quantizer=quantizer)
    llmkit.save(made, tmp_path / "q")
    floats, expected = dequantized(llmkit.open_checkpoint(tmp_path / "q")), measured(ckpt)
    for slot in linear(ckpt):
        weight = ckpt.tensors[slot.name].load()
        rows = method.quantize(weight, Grid(4, None, False), torch.float32, expected[slot.parts[0].id])
        wanted = (unpack(rows.codes, 4, weight.shape[1]).float() - rows.zeros.float()) * rows.scales
        torch.testing.assert_close(floats.tensors[slot.name].load(), wanted, rtol=1e-5, atol=1e-6)
    step = llmkit.open_checkpoint(tmp_path / "q").history[-1]
    assert (step["statistics"], step["sha256"]) == ("s.safetensors", TEXT.digest)


def test_what_a_file_does_not_tell_is_asked_for(tmp_path, model):
    ckpt = model()
    llmkit.save(observe(ckpt, SAMPLES, "s.safetensors"), tmp_path / "s.safetensors")
    quantizer = StoredQuantizer(ckpt, open_statistics(tmp_path / "s.safetensors", ckpt))
    assert quantizer.default_method == "mse"
    with pytest.raises(RequirementError, match=r"does not tell the second moments of .*, which --method gptq"):
        quantize(ckpt, bits=4, group_size="channel", method="gptq", quantizer=quantizer)
    for method, reason in (("signround", "outputs of whole blocks"), ("awq", "each chosen while its block reads")):
        with pytest.raises(RequirementError, match=f"--method {method} .*{reason}"):
            quantize(ckpt, bits=4, group_size="channel", method=method, quantizer=quantizer)
    with pytest.raises(InputError, match="no place for second moments"):
        observe(ckpt, SAMPLES, "s.gguf", has_moments=True)
    with pytest.raises(InputError, match="no file of statistics"):
        observe(ckpt, SAMPLES, "folder")
    assert quantizer.read_of(TEXT) == SAMPLES
    assert quantizer.read_of(CalibrationText("other", "text")) is None


def test_layers_that_take_more_than_hidden_states_are_refused_with_the_plan(model):
    ckpt = model("rwkv7")
    for plan in (lambda: observe(ckpt, SAMPLES, "s.safetensors"), lambda: CalibratedQuantizer(ckpt, SAMPLES)):
        with pytest.raises(RequirementError, match="as all take the values of the first"):
            plan()


def test_experts_that_no_token_reaches_have_statistics_of_nothing(tmp_path, model):
    """And are quantized without: as if every input counted alike."""
    ckpt = model("qwen3_moe")
    few = replace(SAMPLES, n=1, length=8)
    llmkit.save(observe(ckpt, few, "s.safetensors"), tmp_path / "s.safetensors")
    known = open_statistics(tmp_path / "s.safetensors", ckpt)
    slots = [slot for slot in linear(ckpt) if not known.of(slot).squares.any()]
    assert slots
    assert all(".experts." in slot.name for slot in slots)
    made = quantize(ckpt, bits=4, method="mse", quantizer=StoredQuantizer(ckpt, known))
    plain = quantize(ckpt, bits=4, method="mse")
    by_text = quantize(ckpt, bits=4, method="gptq", quantizer=CalibratedQuantizer(ckpt, few))
    packed = {slot.name.removesuffix("weight") + "weight_packed" for slot in slots} & plain.tensors.keys()
    assert packed
    for name in packed:
        assert torch.equal(made.tensors[name].load(), plain.tensors[name].load())
        assert torch.equal(by_text.tensors[name].load(), plain.tensors[name].load())


def test_second_moments_of_many_columns_are_whole_and_more_may_follow():
    x = torch.randn(1500, 400, generator=torch.Generator().manual_seed(0))
    observer = Observer({"second_moments"})
    for part in (x[:1100], x[1100:]):
        observer.see(part)
        found = observer.statistics().second_moments.clone()
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[192:, :192], found[:192, 192:].T)


@pytest.mark.parametrize("n_out", [3, 9])
def test_gptq_rounds_by_cross_products_as_by_cross_moments(n_out):
    """What is measured in a layer with few outputs says the same as the cross moments do; of another it is not."""
    torch.manual_seed(0)
    weight, x = torch.randn(n_out, 16), torch.randn(40, 16)
    floats = x + 0.3 * torch.randn_like(x)
    statistics = []
    measured = GPTQ.needs | {"cross_moments"}
    for observer in (Observer(measured), Observer(measured, constant(weight))):
        for rows in (slice(None, 25), slice(25, None)):
            observer.see(x[rows], floats[rows])
        statistics.append(observer.statistics())
    of_moments, of_weight = statistics
    assert (of_weight.cross_products is not None) == (2 * n_out < 16)
    assert (of_weight.cross_moments is None) == (2 * n_out < 16)
    expected = weight.double() @ (floats - x).double().T @ x.double()
    torch.testing.assert_close(of_weight.crossed(weight).double(), expected, atol=1e-4, rtol=0)
    made = [GPTQ.quantize(weight, Grid(4, 8, True), torch.float32, each) for each in statistics]
    assert torch.equal(made[0].codes, made[1].codes)
    without = GPTQ.quantize(weight, Grid(4, 8, True), torch.float32, replace(of_moments, cross_moments=None))
    assert not torch.equal(made[0].codes, without.codes)
