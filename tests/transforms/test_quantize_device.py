"""`--device`: what computes there gives what the CPU gives, and nothing there meets a tensor of the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import family_world as world
import pytest
import torch
import vocab_world
from fake_device import NAME, FakeDevice

import llmkit
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import InputError, RequirementError
from llmkit.tensors.device import torch_device
from llmkit.transforms.quantize import quantize

TEXT = CalibrationText("english", ("\n".join(vocab_world.ENGLISH) * 4,))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llmkit.open_checkpoint(world.written(tmp_path_factory.mktemp("device") / "m", "llama", None))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("hqq", {}), ("mse", {"type": "fp8", "bits": 8, "group_size": "channel", "symmetric": None}),
        ("awq-gptq", {}), ("signround", {"iterations": 2}),
        ("rtn", {"type": "nf4", "format": "bitsandbytes", "group_size": "auto", "symmetric": None}),
    ],
)  # fmt: skip
def test_the_device_gives_what_the_cpu_gives(monkeypatch, base, method, more):
    for module in ("products", "quantizer"):
        monkeypatch.setattr(f"llmkit.calibration.{module}.product_dtype", lambda device: None)
    monkeypatch.setattr("llmkit.transforms.quantize.device_named", str)
    monkeypatch.setattr("llmkit.decoder.load.torch_device", torch.device)
    # Tensor subclasses do not go well with it.
    monkeypatch.setattr(
        "llmkit.lazy_imports.torch.inference_mode", lambda on=True: torch.no_grad() if on else nullcontext()
    )

    def made(device):
        quantizer = CalibratedQuantizer(base, Samples(TEXT, n=2, length=16)) if method not in ("hqq", "rtn") else None
        given = {"bits": 4, "group_size": 16, "symmetric": False, "only": ["*.layers.0.self_attn.*"], **more}
        after = quantize(base, method=method, quantizer=quantizer, device=device, **given)
        assert after.history[-1].get("device", "cpu") == device
        return {name: lazy.load() for name, lazy in dequantized(after).tensors.items()}

    here = made("cpu")
    with FakeDevice():
        there = made(NAME)
    for name, tensor in here.items():
        assert type(there[name]) is torch.Tensor, name
        # Attention sums in another order there, which can turn a tie.
        assert ((tensor - there[name]).abs() > 1e-5).float().mean() < 0.02, name


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("cuda", RequirementError, "device 'cuda' is not there: torch sees no CUDA device"),
        ("cuda:3", RequirementError, "device 'cuda:3' is not there"),
        ("tpu", InputError, "unknown device 'tpu'; expected cpu, cuda, cuda:1 or auto"),
        ("meta", InputError, "unknown device 'meta'"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, base, name, error, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=words) as refused:
        quantize(base, bits=4, device=name)
    assert refused.value.hint == "--device cpu"
    assert torch_device("auto").type == "cpu"


def test_a_local_rank_that_is_no_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(torch_device("cuda")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "x")
    assert str(torch_device("cuda:0")) == "cuda:0"
    with pytest.raises(InputError, match="the environment has LOCAL_RANK='x', which is no number"):
        torch_device("cuda")
