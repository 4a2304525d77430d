"""Casts without torch give torch's bits, for every 16-bit value and for every kind of float32."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from llmkit.formats.folder import read_file
from llmkit.tensors.moving import Mover, is_moved
from llmkit.tensors.small_casts import CASTS
from llmkit.tensors.spec import DType


def raw(x):
    return x.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("source", [DType.F16, DType.BF16])
def test_every_16_bit_value_is_widened(source):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(source.torch)
    x = x[~x.isnan()]
    assert CASTS[source, DType.F32](memoryview(raw(x))) == raw(x.float())
    assert CASTS[DType.F32, source](memoryview(raw(x.float()))) == raw(x)


@pytest.mark.parametrize("target", [DType.F16, DType.BF16])
def test_float32_is_rounded_as_torch_rounds(target):
    chance = random.Random(0)
    bits = [chance.getrandbits(32) for _ in range(30_000)]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(target.torch)
    middles = raw(every[every.isfinite()].float())  # halfway between neighbours, and next to that
    near = [
        x ^ (0x1000 if target is DType.F16 else 0x8000) ^ d
        for (x,) in struct.iter_unpack("<I", middles)
        for d in (0, 1)
    ]
    x = torch.frombuffer(bytearray(struct.pack(f"<{len(bits) + len(near)}I", *bits, *near)), dtype=torch.float32)
    x = x[~x.isnan()]
    x = x[x.to(target.torch).isfinite() | x.isinf()]
    assert len(x) > 50_000
    assert CASTS[DType.F32, target](memoryview(raw(x))) == raw(x.to(target.torch))


@pytest.mark.parametrize("value", [float("nan"), 1e6, -70000.0, float("inf"), 65519.99])
@pytest.mark.parametrize(("source", "target"), list(CASTS), ids=str)
def test_what_is_odd_has_torchs_bits_too(tmp_path, source, target, value):
    x = torch.tensor([1.5, value, -0.0]).to(source.torch)
    save_file({"x": x}, tmp_path / "m.safetensors")
    node = read_file(tmp_path / "m.safetensors")["x"].cast(target).node
    assert is_moved(node)
    (found,) = Mover(lambda *_: None).evaluate(node, (0, 3))
    assert bytes(found) == raw(x.to(target.torch))


def test_matrices_are_left_to_torch(tmp_path):
    save_file({"x": torch.zeros(300, 300)}, tmp_path / "m.safetensors")
    assert not is_moved(read_file(tmp_path / "m.safetensors")["x"].cast(DType.F16).node)
