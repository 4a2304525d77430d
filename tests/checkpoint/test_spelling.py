"""Files that leave the family's prefix out, as transformers saves them from a model without its head."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmkit.architecture.registry import default_registry, find
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.load import load_decoder
from llmkit.inspection.comparison import compare
from llmkit.inspection.summary import summarize

BARE = {
    "bloom": "BloomModel", "gpt2": "GPT2Model", "opt": "OPTModel", "falcon": "FalconModel", "llama": "LlamaModel",
    "mistral": "MistralModel", "gpt_neox": "GPTNeoXModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model",
    "gemma": "GemmaModel", "gemma2": "Gemma2Model", "gemma3": "Gemma3TextModel", "phi3": "Phi3Model",
    "stablelm": "StableLmModel", "glm": "GlmModel", "glm4": "Glm4Model", "rwkv": "RwkvModel",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def written(folder, family):
    """A tiny model saved whole and without its head: (folder with the prefix, folder without)."""
    architecture = next(default_registry().load(p) for p in default_registry().plugins if p.name == family)
    config = architecture.tiny_config() | {"tie_word_embeddings": True}  # without a head, there is the embedding
    torch.manual_seed(0)
    whole = getattr(transformers, config.pop("architectures")[0])(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    whole.save_pretrained(folder / "whole")
    whole.get_submodule(architecture.names.prefix.rstrip(".")).save_pretrained(folder / "bare")
    return folder / "whole", folder / "bare"


@pytest.mark.parametrize("family", BARE)
def test_a_file_without_the_prefix_is_the_same_model(tmp_path, family):
    whole, bare = written(tmp_path, family)
    prefix = find(json.loads((whole / "config.json").read_text())).names.prefix
    stored = set(load_file(bare / "model.safetensors"))
    assert not any(name.startswith(prefix) for name in stored)
    assert json.loads((bare / "config.json").read_text())["architectures"] == [BARE[family]]
    ckpt = open_checkpoint(bare)
    assert set(ckpt.tensors) == {prefix + name for name in stored} == set(open_checkpoint(whole).tensors)
    (note,) = ckpt.notes
    assert note.startswith(f"{len(stored)} names are read with {prefix!r} before them, as the family has it (")
    assert note in summarize(ckpt).oddities
    assert open_checkpoint(whole).notes == ()
    same = compare(open_checkpoint(whole), ckpt)
    assert (same.removed, same.added, same.beyond(0.0), len(same.differences)) == ((), (), [], len(stored))
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(whole, attn_implementation="eager")(ids).logits
    torch.testing.assert_close(load_decoder(ckpt)(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "buffer"),
    [("gpt2", "h.0.attn.bias"), ("gpt2", "h.1.attn.masked_bias"), ("opt", "decoder.version")],
)
def test_buffers_of_old_files_are_ignored_with_or_without_the_prefix(tmp_path, family, buffer):
    for folder in written(tmp_path, family):
        weights = load_file(folder / "model.safetensors")
        is_bare = folder.name == "bare"
        prefix = find(json.loads((folder / "config.json").read_text())).names.prefix
        name = buffer if is_bare else prefix + buffer
        save_file(weights | {name: torch.ones(1)}, folder / "model.safetensors")
        found = summarize(open_checkpoint(folder))
        assert found.problems == ()
        assert any("1 buffers that nothing needs" in o for o in found.oddities)


def test_names_that_are_no_ones_stay_as_they_are(tmp_path):
    _, bare = written(tmp_path, "gpt2")
    weights = load_file(bare / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(2, 2), "lm_head.weight": weights["wte.weight"].clone()},
              bare / "model.safetensors")  # fmt: skip
    ckpt = open_checkpoint(bare)
    assert {"score.weight", "lm_head.weight", "transformer.wte.weight"} <= set(ckpt.tensors)
    assert "wte.weight" not in ckpt.tensors
    (problem,) = summarize(ckpt).problems
    assert "1 tensor that the model does not have: score.weight" in problem


def test_a_file_alone_takes_the_config_beside_it(tmp_path):
    _, bare = written(tmp_path, "bloom")
    assert "transformer.h.0.input_layernorm.weight" in open_checkpoint(bare / "model.safetensors").tensors
    (bare / "config.json").unlink()
    assert "h.0.input_layernorm.weight" in open_checkpoint(bare / "model.safetensors").tensors


@pytest.mark.parametrize("outer", ["model.", "net.module_."])
def test_names_inside_the_module_that_trained_the_model(tmp_path, outer):
    whole, _ = written(tmp_path, "llama")
    weights = load_file(whole / "model.safetensors")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/config.json").write_bytes((whole / "config.json").read_bytes())
    state = {"state_dict": {outer + name: value for name, value in weights.items()}, "epoch": 3}
    torch.save(state, tmp_path / "trained/pytorch_model.bin")
    ckpt = open_checkpoint(tmp_path / "trained")
    assert set(ckpt.tensors) == set(weights)
    assert ckpt.notes == (f"{len(weights)} names are read without {outer!r}, which they all begin with",)


def test_experts_as_llm_compressor_names_them(tmp_path):
    """0.14 makes linear layers of Mixtral's stacks by the names of other families, and keeps the module's."""
    whole, _ = written(tmp_path, "mixtral")
    weights = load_file(whole / "model.safetensors")
    theirs = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_bytes((whole / "config.json").read_bytes())
    renamed = {re.sub(r"\.(w[123])\.", lambda m: f".{theirs[m[1]]}.", name): value for name, value in weights.items()}
    assert len(renamed.keys() - weights.keys()) > 3
    save_file(renamed, tmp_path / "theirs/model.safetensors")
    ids = torch.arange(5).unsqueeze(0)
    found, wanted = (load_decoder(open_checkpoint(path), dtype="float32") for path in (tmp_path / "theirs", whole))
    assert torch.equal(found(ids), wanted(ids))
