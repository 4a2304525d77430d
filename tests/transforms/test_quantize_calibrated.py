"""Quantizing block after block: what is written, from where an interrupted run goes on, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import vocab_world
from interruption import stopped_in_block

import llmkit
from llmkit.architecture.storage import stored
from llmkit.calibration import products
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.output_moments import output_moments
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText, token_ids, windows
from llmkit.checkpoint.quantized import dequantized
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.decoder import load_decoder
from llmkit.decoder.load import load_blocks
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.gptq import BEST
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.quantization.packing import unpack
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.constant import constant
from llmkit.tensors.lazy import Apply
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.quantize import quantize

TEXT = CalibrationText("english", ("\n".join(vocab_world.ENGLISH) * 4,))
SAMPLES = Samples(TEXT, n=12, length=24, seed=1)
FAMILIES = ["llama", "bloom", "falcon", "gpt_neox", "rwkv", "qwen3", "opt", "phi3", "chatglm2", "deepseek3", "minicpm3"]


def calibrated(ckpt, samples=SAMPLES, **more):
    given = {"bits": 3, "group_size": "channel", "symmetric": False, "method": "gptq"} | more
    return quantize(ckpt, quantizer=CalibratedQuantizer(ckpt, samples), **given)


class Recorder:
    def __init__(self):
        self.inputs = {}

    def see(self, weights, x, float_x):
        self.inputs |= dict.fromkeys(weights, x.clone())

    def settle(self, weights, values):
        return values


def moved_outputs(ckpt, blocks, index, hidden):
    """The output moments of the stored tensors of a layer that have them, in the order of their rows."""
    slots = [slot for slot in ckpt.require_model().slots.values() if slot.kind == "linear" and slot.layer == index]
    n_rows = {part.id: part.shape[0] for slot in slots for part in slot.parts}
    found = output_moments(blocks, index, hidden, range(len(hidden)), n_rows, n_rows)
    moved = {}
    for slot in slots:
        first, *_ = slot.parts
        if ".experts." not in slot.id and first.shape[0] <= first.shape[1] and first.id in found:
            starts = itertools.accumulate((n_rows[part.id] for part in slot.parts), initial=0)
            numbers = {
                part.id: constant(torch.arange(start, start + n_rows[part.id])[:, None])
                for part, start in zip(slot.parts, starts, strict=False)
            }
            order = stored(numbers, slot.upright).load().squeeze(1)
            moved[slot.name] = torch.block_diag(*(found[part.id] for part in slot.parts))[order][:, order]
    return moved


@pytest.mark.parametrize(("method", "family"), [(BEST, family) for family in FAMILIES] + [(GPTQ, FAMILIES[0])])
def test_codes_are_those_for_the_inputs_in_the_quantized_model(tmp_path, model, method, family, monkeypatch):
    """Each layer was quantized for the inputs that it has now that all layers before it are quantized, and for the
    outputs that it had before that; by the best method as those of its block move with them, too. Inputs of the float
    model are compared in bfloat16."""
    monkeypatch.setattr(products, "product_dtype", lambda device: None)
    base = model(family)
    llmkit.save(calibrated(base, method=method.name), tmp_path / "q")
    floats = dequantized(llmkit.open_checkpoint(tmp_path / "q"))
    architecture = base.architecture
    rows = windows(
        token_ids(TEXT, load_tokenizer(base)), 24, samples=12, seed=1, suffix=architecture.prompt_suffix_of(base.config)
    )
    now, before, moved = Recorder(), Recorder(), {}
    for ckpt, recorder in ((floats, now), (base, before)):
        blocks = Blocks(*load_blocks(ckpt), torch.tensor(rows))
        hidden = blocks.embedded()
        for i in range(len(blocks)):
            moved |= moved_outputs(base, blocks, i, hidden)
            hidden = blocks.run(i, hidden, recorder)
    n = 0
    for slot in base.require_model().slots.values():
        if slot.kind != "linear" or slot.layer is None:
            continue
        weight = base.tensors[slot.name].load()
        x, f = now.inputs[slot.parts[0].id], before.inputs[slot.parts[0].id]
        is_routed = ".experts." in slot.id  # other tokens may come than in the float model
        cross = None if is_routed else (f.bfloat16().float() - x.bfloat16()).T @ x
        statistics = Statistics(len(x), x.T @ x, cross, output_moments=moved.get(slot.name))
        made = method.quantize(weight, Grid(3, None, False), torch.float32, statistics)
        codes = unpack(made.codes, 3, weight.shape[1]).float() - made.zeros.float()
        found = floats.tensors[slot.name].load()
        differing = ((codes * made.scales - found).abs() > 1e-6).float().mean()
        assert differing < 0.02, (slot.name, float(differing))
        n += 1
    assert n >= 4


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_model_is_nearer_than_rounded_to_nearest(tmp_path, model, family):
    base = model(family)
    ids = torch.tensor(windows(token_ids(TEXT, load_tokenizer(base)), 24))
    whole = load_decoder(base)(ids)
    errors = {}
    nearest = quantize(base, bits=3, group_size="channel", method="rtn")
    for name, made in {"rtn": nearest, "gptq": calibrated(base)}.items():
        llmkit.save(made, tmp_path / name)
        errors[name] = float((load_decoder(llmkit.open_checkpoint(tmp_path / name))(ids) - whole).square().mean())
    assert errors["gptq"] < errors["rtn"] * 0.9


@pytest.mark.parametrize(
    ("block", "options"),
    [
        ("text", {}), ("0", {}), ("1", {}), ("1", {"method": "gptq-fast"}),
        ("0", {"method": "gptq-fast", "format": "gptq", "bits": 4, "group_size": 16, "symmetric": True,
               "act_order": True, "only": ["*.q_proj"]}),
    ],
)  # fmt: skip
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path, model, monkeypatch, block, options):
    base = model()
    llmkit.save(calibrated(base, **options), tmp_path / "whole")
    computed = stopped_in_block(monkeypatch, block)
    with pytest.raises(KeyboardInterrupt):
        llmkit.save(calibrated(base, **options), tmp_path / "q")
    assert not (tmp_path / "q").exists()
    llmkit.save(calibrated(base, **options), tmp_path / "q")
    assert computed[computed.index(block) + 1] == block  # the first that the rerun computes
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "q").iterdir()} == names
    for name in names - {"llmkit.json"}:
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not Path(f"{tmp_path / 'q'}.partial").exists()


def test_the_same_checkpoint_is_written_twice_and_after_an_interruption(tmp_path, model, monkeypatch):
    made = calibrated(model())
    stopped_in_block(monkeypatch, "1")
    with pytest.raises(KeyboardInterrupt):
        llmkit.save(made, tmp_path / "a")
    for name in ("a", "b"):
        llmkit.save(made, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_any_number_of_workers_and_samples_in_the_history(tmp_path, model):
    base = model()
    for workers in (1, 4):
        llmkit.save(calibrated(base), tmp_path / f"w{workers}", workers=workers)
    one, four = (tmp_path / f"w{n}/model.safetensors" for n in (1, 4))
    assert one.read_bytes() == four.read_bytes()
    step = llmkit.open_checkpoint(tmp_path / "w1").history[-1]
    assert {k: step[k] for k in ("method", "calibration", "sha256", "samples", "length", "seed")} == {
        "method": "gptq", "calibration": "english", "sha256": TEXT.digest, "samples": 12, "length": 24, "seed": 1,
    }  # fmt: skip


def test_a_text_shorter_than_a_sample(tmp_path, model):
    short = Samples(CalibrationText("short.txt", ("A few words.",)), n=4, length=64)
    with pytest.raises(InputError, match=r"short\.txt has \d+ tokens, fewer than one sample of 64"):
        llmkit.save(calibrated(model(), short), tmp_path / "q")
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial").exists()


def test_the_head_has_inputs_that_are_not_measured(model):
    with pytest.raises(RequirementError, match=r"lm_head\.weight is in no layer that is calibrated"):
        calibrated(model(), only=["lm_head"])


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_groups_by_act_order_are_stored_with_each_weight(tmp_path, model, layout):
    base = model()
    planned = calibrated(base, bits=4, group_size=16, symmetric=True, act_order=True, only=["*.q_proj"], format=layout)
    assert any("refuse groups by act-order" in note for note in planned.notes) == (layout == "compressed-tensors")
    llmkit.save(planned, tmp_path / "q")
    made = llmkit.open_checkpoint(tmp_path / "q")
    name = "model.layers.0.self_attn.q_proj."
    order = made.tensors[name + ("g_idx" if layout == "gptq" else "weight_g_idx")].load()
    assert order.bincount().tolist() == [16] * (len(order) // 16)
    assert not torch.equal(order, order.sort().values)
    weight = base.tensors[name + "weight"].load()
    error = dequantized(made).tensors[name + "weight"].load() - weight
    assert error.norm() < 0.2 * weight.norm()


def test_an_order_is_refused_where_there_is_none(model):
    base = model()
    with pytest.raises(InputError, match="--method mse has no order of columns"):
        calibrated(base, method="mse", act_order=True)
    for layout in ("awq", "bitsandbytes"):
        made = {"bits": 4, "group_size": 32, "symmetric": layout != "awq", "keep": ["*.down_proj"], "format": layout}
        with pytest.raises(SpecError, match=f"{layout} has no columns in another order") as caught:
            calibrated(base, act_order=True, **made)
        assert caught.value.hint == "leave --act-order out, or take --format gptq"
        calibrated(base, **made)


def test_gptq_without_a_text(model):
    with pytest.raises(RequirementError, match="--method gptq needs second moments of the inputs of each layer"):
        quantize(model(), bits=4, method="gptq")


def test_a_method_that_does_not_look_at_inputs_is_not_calibrated(model):
    with pytest.raises(InputError, match="--method rtn does not look at the inputs of layers"):
        calibrated(model(), method="rtn")


@pytest.mark.parametrize("way", [{}, {"method": "signround", "iterations": 0}], ids=["gptq", "signround"])
def test_nan_in_a_weight_names_the_layer(tmp_path, model, way):
    base = model()
    name = "model.layers.1.mlp.up_proj.weight"
    bad = base.tensors[name].load()
    bad[0, 0] = float("nan")
    spec = TensorSpec(DType.F32, tuple(bad.shape))
    constant = Apply("constant", [], spec, lambda: bad, row_step=None, output_rows=[0]).output()
    broken = base.derive(tensors={**base.tensors, name: constant})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: the weights hold NaN"):
        llmkit.save(calibrated(broken, **way), tmp_path / "q")
    assert not (tmp_path / "q.partial").exists()
