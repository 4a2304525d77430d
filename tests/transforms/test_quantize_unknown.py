"""Models that no plugin describes: their layers are named, and what is none of them is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

import llmkit
from llmkit.errors import RequirementError, SpecError
from llmkit.transforms.quantize import quantize


def test_without_a_plugin_the_layers_must_be_named(tmp_path):
    state = {"a.lin.weight": torch.randn(8, 64), "a.emb.weight": torch.randn(9, 64), "a.lin.bias": torch.zeros(8)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OkapiForCausalLM"]}))
    ckpt = llmkit.open_checkpoint(tmp_path)
    with pytest.raises(RequirementError, match="no plugin describes OkapiForCausalLM") as caught:
        quantize(ckpt, bits=8)
    assert "--only" in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps({"architectures": 7}))
    with pytest.raises(RequirementError, match="no plugin describes its architecture"):
        quantize(llmkit.open_checkpoint(tmp_path), bits=8)
    out = quantize(ckpt, bits=8, only=["a.lin"])
    assert "a.lin.weight_packed" in out.tensors
    assert "a.emb.weight" in out.tensors
    assert out.config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["a.lin"]
    skipped = quantize(ckpt, bits=8, only=["a.lin"], format="bitsandbytes").config["quantization_config"]
    assert skipped["llm_int8_skip_modules"] == ["a.emb"]  # whatever it is
    with pytest.raises(SpecError, match=r"matches no matrix whose name ends in \.weight"):
        quantize(ckpt, bits=8, only=["a.lin.bias"])


def unknown(folder, tensors):
    save_file({name: torch.randn(shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["OkapiForCausalLM"]}))
    return llmkit.open_checkpoint(folder)


@pytest.mark.parametrize("only", ["h.*.fc", "h.*.proj"], ids=["the bias tells", "a square one among others"])
def test_transposed_layers_of_an_unknown_family_are_refused(tmp_path, only):
    ckpt = unknown(tmp_path, {
        "h.0.fc.weight": (32, 64), "h.0.fc.bias": (64,), "h.0.proj.weight": (32, 32), "h.0.proj.bias": (32,),
    })  # fmt: skip
    with pytest.raises(RequirementError, match=rf"{only.replace('*', '0')}\.weight are stored as \[in, out\]"):
        quantize(ckpt, bits=8, only=[only])


def test_what_is_an_embedding_by_its_name_is_refused(tmp_path):
    tensors = {"wte.weight": (40, 32), "h.0.pos_emb.weight": (9, 32), "h.0.embed_in.weight": (64, 32),
               "h.0.embed_in.bias": (64,), "embed_out.weight": (40, 32)}  # fmt: skip
    with pytest.raises(SpecError, match=r"wte\.weight and 1 more are embeddings|pos_emb\.weight and 1 more") as caught:
        quantize(unknown(tmp_path, tensors), bits=8, only=["*"])
    assert caught.value.hint == "leave them out: --keep 'h.*.pos_emb' --keep 'wte'"
    made = quantize(unknown(tmp_path, tensors), bits=8, only=["*"], keep=["h.*.pos_emb", "wte"])
    assert {"h.0.embed_in.weight_packed", "embed_out.weight_packed"} <= set(made.tensors)
