"""Rotary frequencies: the bits of transformers' own functions with torch's powers; the rounded ones next to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmkit.architecture.frequencies import frequencies, rounded_power
from llmkit.architecture.kinds import Rope
from llmkit.architecture.scaling import NoScaling
from llmkit.decoder.positions import frequencies as of_the_decoder

# Of published models (Llama 1 to 3, Code Llama, Qwen 1 to 3, Gemma 3, SmolLM2 and 3, ChatGLM3-32k, Yi, InternLM, …).
THETAS = [1e4, 4e4, 5e4, 81920.0, 1e5, 130000.0, 150000.0, 160000.0, 2e5, 2.5e5, 3e5, 5e5, 10000.0 * 50, 1e6, 1.5e6,
          2.5e6, 5e6, 8e6, 1e7, 11158840.0, 1e8]  # fmt: skip
DIMS = [16, 20, 24, 32, 48, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = [
    ("linear", {"factor": 4.0}),
    ("linear", {"factor": 2.7}),
    ("dynamic", {"factor": 2.0}),
    ("llama3", {"factor": 8.0, **LLAMA3}),
    ("llama3", {"factor": 32.0, **LLAMA3}),
    ("llama3", {**LLAMA3, "factor": 2.5, "low_freq_factor": 1.3, "original_max_position_embeddings": 300}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
    ("yarn", {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7}),
    ("yarn", {"factor": 8.0, "original_max_position_embeddings": 2048, "truncate": False, "beta_fast": 16}),
]  # fmt: skip


def given(theta, dim, name, params):
    """Their frequencies and factor for short, equal and longer sequences, and our bound scaling."""
    config = {"max_position_embeddings": 4096, "rope_theta": theta, "rope_scaling": {"rope_type": name, **params}}
    theirs = transformers.LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, **config)
    found = {length: ROPE_INIT_FUNCTIONS[name](theirs, "cpu", seq_len=length) for length in (None, 5000)}
    return found, Rope().bind(config).bound_scaling


def steps(a, b):
    """How many float32 numbers lie between two positive ones."""
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))


def test_plain_frequencies_have_the_bits_of_torch():
    for theta in THETAS:
        for dim in DIMS:
            wanted = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).to(dtype=torch.float) / dim))
            assert torch.equal(of_the_decoder(theta, dim, NoScaling())[0], wanted)


@pytest.mark.parametrize(("name", "params"), SCALINGS, ids=str)
def test_scaled_frequencies_have_the_bits_of_transformers(name, params):
    for theta in THETAS[::3]:
        for dim in (32, 80, 128):
            theirs, scaling = given(theta, dim, name, params)
            for length, (wanted, factor) in theirs.items():
                found, ours = of_the_decoder(theta, dim, scaling, length)
                assert torch.equal(found, wanted), (theta, dim, length)
                assert ours == pytest.approx(factor, rel=1e-12)
                # Without torch: the power is one unit off at most, and the formulas after it add what they round.
                assert steps(frequencies(theta, dim, scaling, length)[0], wanted.numpy()).max() <= 8


@pytest.mark.parametrize("length", [None, 4097])
def test_longrope_has_the_bits_of_transformers(length):
    g = torch.Generator().manual_seed(0)
    short, long = ((1 + k * torch.rand(48, generator=g)).tolist() for k in (1, 40))
    params = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 4096}
    config = {"max_position_embeddings": 131072, "rope_theta": 1e4, "rope_scaling": {"rope_type": "longrope", **params}}
    theirs = transformers.LlamaConfig(hidden_size=384, num_attention_heads=4, head_dim=96, **config)
    theirs.original_max_position_embeddings = 4096
    wanted, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
    scaling = Rope().bind({**config, "original_max_position_embeddings": 4096}).bound_scaling
    found, ours = of_the_decoder(1e4, 96, scaling, length)
    assert torch.equal(found, wanted)
    assert ours == pytest.approx(factor)


def test_rounded_powers_are_the_nearest_floats_and_torchs_are_next_to_them():
    n = n_other = 0
    for theta in THETAS:
        for dim in DIMS:
            exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
            found = rounded_power(theta, exponents)
            assert found.tolist() == [float(np.float32(math.pow(theta, x))) for x in exponents.tolist()]
            torchs = (theta ** torch.from_numpy(exponents)).numpy()
            assert steps(found, torchs).max() <= 1
            n, n_other = n + found.size, n_other + int((found != torchs).sum())
    assert n_other < 0.02 * n  # measured: 1.2 % of 26028, with AVX-512
