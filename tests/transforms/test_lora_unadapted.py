"""Linear layers on which PEFT puts no adapter: what changed of them is in an extracted adapter as it is."""

from __future__ import annotations

import family_world as world
import pytest
import torch

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.contract import random_ids
from llmkit.decoder.load import load_decoder
from llmkit.transforms.lora import extract


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "falcon_h1"])
def test_an_extracted_adapter_loads_in_peft(tmp_path, name):
    base = open_checkpoint(world.written(tmp_path / "base", name, None))
    tuned = world.moved(base, tmp_path / "tuned", only=world.layers_of(base))
    adapter = extract(base, tuned, rank=1000)
    assert any("PEFT puts no adapter on" in note and "out_proj" in note for note in adapter.notes)
    save(adapter, tmp_path / "adapter")
    model = world.by_transformers(tmp_path / "base", world.ARCHITECTURES[name].reference_attention)
    ids = random_ids(world.ARCHITECTURES[name], base.config)
    with torch.no_grad():
        live = world.peft_model(model, tmp_path / "adapter")(ids).logits
    ours = load_decoder(tuned)(ids)
    assert float((ours - live).abs().max() / ours.abs().max().clamp(min=1)) <= 2e-5
