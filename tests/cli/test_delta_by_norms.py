"""A model whose norms look like those of a delta: refused, and with --force taken for what its owner says it is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.classification import classify


@pytest.fixture
def doubtful(model):
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    small = {n: torch.randn(t.shape, generator=generator) * 0.01 for n, t in tensors.items() if "norm" in n}
    save_file(tensors | small, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("command", ["quantize M --bits 8", "export M --to onnx --no-check"])
def test_force_takes_it_for_a_model(call, tmp_path, doubtful, command):
    words = [doubtful if word == "M" else word for word in command.split()]
    refused = call(*words, "-o", tmp_path / "out", "--dry-run")
    assert refused.code == 2
    assert "is a delta by its norms, whose weights are small and of both signs" in refused.err
    assert "take it for a model with --force" in refused.err
    forced = call(*words, "-o", tmp_path / "out", "--force", "--dry-run")
    assert forced.code == 0, forced.err
    assert "forced: model is a delta by its norms" in forced.err


def test_what_is_made_of_it_is_a_model(call, tmp_path, doubtful):
    assert call("convert", doubtful, "--to", "hf", "--dtype", "bfloat16", "-o", tmp_path / "out", "--force").code == 0
    assert classify(open_checkpoint(doubtful)).kind == "delta"
    assert classify(open_checkpoint(tmp_path / "out")).kind == "model"
    assert call("generate", tmp_path / "out", "w1", "--max-tokens", "1").code == 0
