"""Composed = staged, bit for bit: transforms in one pass give the bytes of the commands run one by one."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llmkit
from llmkit.transforms import delta, lora, quantize, vocab

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip


def write_llama(folder, seed, dtype, scale=0.05, config=CONFIG):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    )
    state = {k: (v * scale / 0.02).to(dtype) for k, v in model.state_dict().items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_delta_then_quantize(tmp_path, dtype, bits, symmetric):
    base = write_llama(tmp_path / "base", 1, dtype)
    change = write_llama(tmp_path / "change", 2, dtype, scale=0.001)
    save_file(
        {k: base[k] + change[k] * (0 if "norm" in k else 1) for k in base},
        tmp_path / "change/model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    base_ckpt, tuned_ckpt = llmkit.open_checkpoint(tmp_path / "base"), llmkit.open_checkpoint(tmp_path / "change")
    llmkit.save(delta.make(base_ckpt, tuned_ckpt), tmp_path / "delta")
    made = llmkit.open_checkpoint(tmp_path / "delta")

    llmkit.save(delta.apply(base_ckpt, made), tmp_path / "staged-1")
    middle = llmkit.open_checkpoint(tmp_path / "staged-1")
    llmkit.save(quantize.quantize(middle, bits=bits, symmetric=symmetric), tmp_path / "staged-2")
    composed = quantize.quantize(delta.apply(base_ckpt, made), bits=bits, symmetric=symmetric)
    llmkit.save(composed, tmp_path / "composed")

    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "staged-2" / name).read_bytes() == (tmp_path / "composed" / name).read_bytes(), name
    recipes = [json.loads((tmp_path / d / "llmkit.json").read_text())["recipe"] for d in ("staged-2", "composed")]
    assert [[s["transform"] for s in r] for r in recipes] == [["delta.apply", "quantize"]] * 2


def test_delta_then_lora_then_vocab_then_quantize(tmp_path):
    """The mini model through four commands, one by one and in one plan."""
    mini = files("llmkit_evalsets") / "mini"
    base, change, adapter = (Path(str(mini / name)) for name in ("base", "delta", "adapter"))
    (tmp_path / "words.txt").write_text("<|question|>\nwyvernstone\n")
    steps = (
        lambda ckpt: delta.apply(ckpt, llmkit.open_checkpoint(change)),
        lambda ckpt: lora.merge(ckpt, [lora.open_adapter(adapter)]),
        lambda ckpt: vocab.extend(ckpt, tmp_path / "words.txt", init="pieces", pad_to_multiple=64),
        lambda ckpt: quantize.quantize(ckpt, bits=8),
    )
    staged = composed = llmkit.open_checkpoint(base)
    for i, step in enumerate(steps):
        composed = step(composed)
        llmkit.save(step(staged), tmp_path / str(i))
        staged = llmkit.open_checkpoint(tmp_path / str(i))
    llmkit.save(composed, tmp_path / "composed")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "3" / name).read_bytes() == (tmp_path / "composed" / name).read_bytes(), name
    recipe = json.loads((tmp_path / "composed/llmkit.json").read_text())["recipe"]
    assert [s["transform"] for s in recipe] == ["delta.apply", "lora.merge", "vocab.extend", "quantize"]
