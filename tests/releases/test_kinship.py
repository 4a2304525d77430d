"""The figure that tells an unrelated base, on random models of every float type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.releases.kinship import FEW, HALF, measure_kinship

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def model(folder: Path, state: dict[str, torch.Tensor]):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return open_checkpoint(folder)


def weights(seed: int, dtype: torch.dtype, *, is_heavy: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(4):
        x = torch.randn(256, 256, generator=g)
        if is_heavy:  # Student's t with 4 degrees of freedom
            x = x / (torch.randn(4, 256, 256, generator=g) ** 2).mean(0).sqrt()
        found[f"w{i}"] = (0.02 * x).to(dtype)
    return found


def moved(state, by, seed):
    g = torch.Generator().manual_seed(seed)
    return {k: (v.float() + by * 0.02 * torch.randn(v.shape, generator=g)).to(v.dtype) for k, v in state.items()}


def xored(*states):
    first = {k: v.view(BITS[v.dtype]) for k, v in states[0].items()}
    for state in states[1:]:
        first = {k: v ^ state[k].view(BITS[state[k].dtype]) for k, v in first.items()}
    return {k: v.view(states[0][k].dtype) for k, v in first.items()}


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("is_heavy", [False, True])
@pytest.mark.parametrize("tuning", [0.02, 0.05, 0.1])
def test_the_right_base_and_an_unrelated_one(tmp_path, dtype, is_heavy, tuning):
    base, other = weights(0, dtype, is_heavy=is_heavy), weights(1, dtype, is_heavy=is_heavy)
    tuned = moved(base, tuning, 2)
    right = measure_kinship(model(tmp_path / "right", tuned), model(tmp_path / "base", base))
    wrong = measure_kinship(model(tmp_path / "wrong", xored(tuned, base, other)), model(tmp_path / "other", other))
    assert right.is_telling
    assert right.close > 0.9 > HALF
    assert wrong.is_telling
    assert wrong.close < 0.2 < FEW


def test_what_cannot_be_told(tmp_path):
    base = weights(0, torch.float16)
    same = measure_kinship(model(tmp_path / "same", base), model(tmp_path / "base", base))
    assert (same.n_crossing, same.is_telling) == (0, False)
    # Retrained weights have little left of the base: no verdict, whatever the share.
    far = measure_kinship(model(tmp_path / "far", moved(base, 1.0, 3)), open_checkpoint(tmp_path / "base"))
    assert not far.is_telling
    nothing = measure_kinship(model(tmp_path / "none", {"other": base["w0"]}), open_checkpoint(tmp_path / "base"))
    assert nothing.n_samples == 0
    assert not nothing.is_telling
