"""A model in each quantized layout of others opens wherever a model is asked for; delta and adapters say why not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from word_model import write_model

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized
from tests.published import LAYOUTS, write_published


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    base = write_model(d / "base", torch_dtype="float16")
    (d / "adapter").mkdir()
    q = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file({f"{q}lora_A.weight": torch.rand(4, 64), f"{q}lora_B.weight": torch.rand(64, 4)},
              d / "adapter" / "adapter_model.safetensors")  # fmt: skip
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (d / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    (d / "text.txt").write_text("t1 t2 t3 t4 " * 20)
    for name in LAYOUTS:
        write_published(base, d / name, name)
    return d


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_opens_wherever_a_model_is_asked_for(world, call, tmp_path, name):
    x, layout = world / name, LAYOUTS[name]
    shown = call("inspect", x)
    assert (shown.code, layout.words in " ".join(shown.out.split())) == (0, True), shown.out + shown.err
    floats = tmp_path / "floats"
    for args in (
        ("convert", x, "--to", "hf", "--dtype", "float16", "-o", floats),
        ("generate", x, "t1", "--max-tokens", "2"),
        ("perplexity", x, "--text", world / "text.txt"),
        ("convert", x, "--to", "gguf", "--type", "f16", "-o", tmp_path / "g"),
        ("export", x, "--to", "onnx", "--dry-run", "-o", tmp_path / "onnx"),
    ):
        done = call(*args)
        assert (done.code, "does not read" in done.err) == (0, False), (args, done.err)
    (tmp_path / "new.txt").write_text("brandnew\n")
    done = call("vocab", "extend", x, "--with", tmp_path / "new.txt", "-o", tmp_path / "extended")
    assert done.code == 0, done.err
    assert call("inspect", tmp_path / "extended", "--json").document["quantization"]
    assert call("diff", x, floats).code == 0  # restored alike, name by name
    wanted = dequantized(open_checkpoint(x))
    made = open_checkpoint(floats)
    assert not {"quantization_config", "quantization_bit"} & set(made.config)
    assert all(torch.equal(lazy.load(), wanted[key].load()) for key, lazy in made.tensors.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_wants_floats_says_why_and_what_to_do(world, call, tmp_path, name):
    x, out = world / name, tmp_path / "out"
    for args in (
        ("quantize", x, "--bits", "8", "-o", out), ("lora", "merge", x, world / "adapter", "-o", out),
        ("delta", "make", world / "base", x, "-o", out),
    ):  # fmt: skip
        done = call(*args)
        said = " ".join(done.err.split())
        assert (done.code, LAYOUTS[name].words in said, "--to dense" in said) == (2, True, True), (args, said)
        assert not out.exists()
