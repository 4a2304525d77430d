"""Adapters whose files lack what their configs say was trained."""

from __future__ import annotations

import json
import warnings

import peft_world as world
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmkit.errors import InputError, RequirementError
from llmkit.transforms.lora import merge, open_adapter


def trained(folder, *, without, tied=False, **options):
    """A base and an adapter of it that lacks the tensors with this in their names."""
    model = world.llama(tied=tied)
    world.train(model, LoraConfig(r=2, **{"target_modules": ["q_proj", "v_proj"], **options}), folder / "adapter")
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if without not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    return world.open_base(world.save_base(model, folder / "base")), folder / "adapter"


def warned_by_peft(ckpt, adapter):
    """What PEFT says when it loads the adapter."""
    model = AutoModelForCausalLM.from_pretrained(ckpt.origin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, adapter)
    return " ".join(str(w.message) for w in caught)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "input_layernorm"])
def test_a_module_that_was_trained_whole_and_is_not_there(tmp_path, name):
    """PEFT's conversion of PiSSA leaves modules_to_save out, and PEFT cannot load what it saved."""
    ckpt, adapter = trained(tmp_path, without=name, modules_to_save=[name])
    with pytest.raises(RequirementError, match=f"names {name}, and its file holds no tensor of it") as caught:
        merge(ckpt, [open_adapter(adapter)])
    assert "--force" in caught.value.hint
    made = merge(ckpt, [open_adapter(adapter)], force=True)
    assert any("forced" in warning and name in warning for warning in made.warnings)
    full = [n for n in ckpt.tensors if n.endswith(f"{name}.weight")]
    assert all(torch.equal(made.tensors[n].load(), ckpt.tensors[n].load()) for n in full)


def test_one_of_two_tied_ends_and_modules_of_other_classes_are_enough(tmp_path):
    ckpt, adapter = trained(
        tmp_path, without="lm_head", tied=True, modules_to_save=["embed_tokens", "lm_head", "score", "classifier"]
    )
    assert merge(ckpt, [open_adapter(adapter)]).warnings == ()


def test_layers_without_the_update_that_the_config_names(tmp_path):
    ckpt, adapter = trained(tmp_path, without="layers.1.self_attn.v_proj")
    assert "layers.1.self_attn.v_proj" in warned_by_peft(ckpt, adapter)
    said = merge(ckpt, [open_adapter(adapter)]).warnings
    assert len(said) == 1
    assert "no update for 1 module that target_modules" in said[0]
    assert "model.layers.1.self_attn.v_proj" in said[0]


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0]},
        {"exclude_modules": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*0.*q_proj"},
    ],
)
def test_layers_that_the_config_leaves_out_are_not_missed(tmp_path, options):
    model = world.llama()
    world.train(model, LoraConfig(r=2, **{"target_modules": ["q_proj", "up_proj"], **options}), tmp_path / "adapter")
    ckpt = world.open_base(world.save_base(model, tmp_path / "base"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config.items() >= {k: v for k, v in options.items() if k != "exclude_modules"}.items()
    assert merge(ckpt, [open_adapter(tmp_path / "adapter")]).warnings == ()


@pytest.mark.parametrize(
    ("options", "without", "key"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", "use_dora"),
        ({"trainable_token_indices": [3, 6]}, "trainable_tokens", "trainable_token_indices"),
    ],
)
def test_what_was_trained_beside_the_factors_and_is_not_there(tmp_path, options, without, key):
    ckpt, adapter = trained(tmp_path, without=without, **options)
    with pytest.raises(RequirementError, match=f"which {key} of its adapter_config.json says was trained") as caught:
        open_adapter(adapter)
    assert "--force" in caught.value.hint
    made = merge(ckpt, [open_adapter(adapter, force=True)], force=True)
    assert any(warning.startswith("forced: ") and key in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"target_modules": ["q_proj"]}, "v_proj"),
        ({"target_modules": ".*q_proj"}, "v_proj"),
        ({"exclude_modules": ["v_proj"]}, "v_proj"),
        ({"exclude_modules": "model.layers.1.*"}, "layers.1"),
        ({"layers_to_transform": [0]}, "layers.1"),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, "layers.1"),
    ],
)
def test_updates_that_the_config_leaves_out_are_named(tmp_path, options, left_out):
    """They are what PEFT would not load: merged, it gives another model."""
    model = world.llama()
    world.train(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    ckpt = world.open_base(world.save_base(model, tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ckpt.origin), tmp_path / "adapter")
    held = {
        n.split(".lora_A.")[0].removeprefix("base_model.model.") for n, _ in loaded.named_parameters() if "lora_A" in n
    }
    (said,) = merge(ckpt, [open_adapter(tmp_path / "adapter")]).warnings
    assert left_out in said
    assert not any(module in said for module in held)
    assert "would not load" in said


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3"])
def test_a_config_of_another_kind_of_adapter(tmp_path, kind):
    world.train(world.llama(), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
    with pytest.raises(InputError, match=f"is {kind}, and its file holds lora_A of model.layers.0.self_attn.q_proj"):
        open_adapter(tmp_path)
