"""consolidated.safetensors with params.json: Meta's names, heads and MLPs of stated sizes."""

from __future__ import annotations

import json

import pytest
import torch
from layout_world import config, meta_state, same, state_of
from safetensors.torch import save_file

import llmkit
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.transforms.convert import convert


def native(folder, cfg, state, shards=1, **more):
    folder.mkdir()
    tensors = {k: v.contiguous() for k, v in meta_state(state, cfg).items()}
    names = list(tensors)
    for i in range(shards):
        file = "consolidated.safetensors" if shards == 1 else f"consolidated-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
    params = {
        "dim": cfg["hidden_size"], "n_layers": cfg["num_hidden_layers"], "n_heads": cfg["num_attention_heads"],
        "n_kv_heads": cfg["num_key_value_heads"], "head_dim": 8, "hidden_dim": cfg["intermediate_size"],
        "vocab_size": cfg["vocab_size"], "norm_eps": 1e-5, "rope_theta": 1000000.0, **more,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v != "absent"}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_read_as_transformers_converts_it(tmp_path, shards):
    from transformers import AutoModelForCausalLM

    cfg = config(rope_theta=1000000.0)
    state = state_of(cfg)
    read = llmkit.open_checkpoint(native(tmp_path / "n", cfg, state, shards, sliding_window=None))
    assert read.layout == "consolidated"
    same(read, state)
    llmkit.save(convert(read, to="hf"), tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        want = theirs(ids).logits
    assert theirs.config.rope_parameters["rope_theta"] == 1000000.0 if hasattr(theirs.config, "rope_parameters") else 1
    assert (llmkit.load_decoder(read)(ids) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"sliding_window": 4096}, RequirementError, "sliding_window is not read"),
        ({"moe": {"num_experts": 8}}, RequirementError, "moe is not read"),
        ({"vision_encoder": {}, "quantization": {}}, RequirementError, "vision_encoder, quantization are not read"),
        ({"dim": "x"}, InputError, "dim is 'x', expected a positive whole number"),
        ({"hidden_dim": 40}, InputError, r"\[48, 32\]"),
        ({"n_layers": 3}, InputError, "missing"),
        ({"n_heads": "absent"}, InputError, "n_heads is None"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, more, kind, words):
    cfg = config()
    folder = native(tmp_path / "n", cfg, state_of(cfg), **more)
    with pytest.raises(kind, match=words):
        llmkit.open_checkpoint(folder)


def test_files_that_are_missing_are_named(tmp_path):
    cfg = config()
    folder = native(tmp_path / "n", cfg, state_of(cfg), 3)
    (folder / "consolidated-00002-of-00003.safetensors").unlink()
    with pytest.raises(LlmkitError, match="2 of 3 shards are there"):
        llmkit.open_checkpoint(folder)
    (folder / "params.json").unlink()
    with pytest.raises(InputError, match=r"no params\.json, which says what model it is"):
        llmkit.open_checkpoint(folder)
