"""What is odd about a model is said, each oddity by its own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.contract import random_checkpoint
from llmkit.inspection.summary import summarize

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "float16",
}  # fmt: skip


def tensors(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    shapes = {
        "model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "lm_head.weight": (40, 16),
        "model.layers.0.input_layernorm.weight": (16,), "model.layers.0.post_attention_layernorm.weight": (16,),
        "model.layers.0.mlp.gate_proj.weight": (24, 16), "model.layers.0.mlp.up_proj.weight": (24, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 24),
    }  # fmt: skip
    shapes |= {f"model.layers.0.self_attn.{x}_proj.weight": (16, 16) for x in "qkvo"}
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def gptq(weights: dict[str, torch.Tensor], stem: str) -> dict[str, torch.Tensor]:
    """With a matrix of 16 x 16 in GPTQ's 4 bits."""
    n_words = {"qweight": (2, 16), "qzeros": (1, 2)}
    parts = {stem + name: torch.zeros(shape, dtype=torch.int32) for name, shape in n_words.items()}
    kept = {name: t for name, t in weights.items() if not name.startswith(stem)}
    return kept | parts | {f"{stem}scales": torch.zeros(1, 16).half()}


def model(folder: Path, weights: dict[str, torch.Tensor], *, n_tokens: int | None = 40, **changes: object) -> Path:
    folder.mkdir()
    save_file(weights, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    if n_tokens is not None:
        vocab = {f"t{i}": i for i in range(n_tokens - 1)}
        added = [{"id": n_tokens - 1, "content": "[PAD]"}]
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added})
        )
    return folder


def test_a_sound_model_has_nothing_odd(tmp_path):
    found = summarize(open_checkpoint(model(tmp_path / "m", tensors())))
    assert (found.problems, found.oddities) == ((), ())
    assert found.architecture == "llama"
    assert found.n_parameters == sum(t.numel() for t in tensors().values())
    assert found.dtypes == {"F16": 2 * found.n_parameters}
    assert {p.name: p.n_tensors for p in found.parts} == {
        "embedding": 1, "attention": 4, "mlp": 3, "norms": 3, "head": 1,
    }  # fmt: skip
    assert found.vocabulary.n_tokens == 40
    assert found.vocabulary.n_added == 1


ODD = {
    "inv_freq": (
        lambda: tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
        {},
        "oddities",
        "1 buffers that nothing needs are ignored",
    ),
    "tied head": (
        tensors,
        {"tie_word_embeddings": True},
        "oddities",
        "is stored, too: a copy of the embedding",
    ),
    "bf16 labelled float16": (lambda: tensors(torch.bfloat16), {}, "oddities", "lost 3 bits"),
    "float32 labelled float16": (lambda: tensors(torch.float32), {}, "oddities", "stored as float32, config.json says"),
    "special id": (tensors, {"pad_token_id": 40}, "oddities", "pad_token_id 40 of config.json is no row"),
    "negative id": (tensors, {"pad_token_id": -1}, "oddities", "pad_token_id -1 of config.json is no row"),
    "no tokenizer": (tensors, {"n_tokens": None}, "oddities", "no tokenizer files"),
    "small tokenizer": (tensors, {"n_tokens": 38}, "oddities", "38"),
    "large tokenizer": (tensors, {"n_tokens": 41}, "problems", "41"),
    "other shape": (tensors, {"intermediate_size": 25}, "problems", "has shape [24, 16], expected [25, 16]"),
    "missing": (
        lambda: {k: v for k, v in tensors().items() if k != "model.norm.weight"},
        {},
        "problems",
        "1 tensor missing: model.norm.weight",
    ),
    "extra": (lambda: tensors() | {"x": torch.zeros(1)}, {}, "problems", "1 tensor that the model does not have: x"),
    "config contradicts itself": (tensors, {"num_attention_heads": 3}, "problems", "is not a multiple of"),
    "unknown architecture": (
        tensors,
        {"architectures": ["OkapiForCausalLM"], "model_type": "okapi"},
        "oddities",
        "no plugin describes OkapiForCausalLM",
    ),
    "bits of a config": (
        lambda: gptq(tensors(), "model.layers.0.self_attn.q_proj."),
        {"quantization_config": {"quant_method": "gptq", "bits": 8}},
        "oddities",
        "quantization_config says bits 8, and the shapes of model.layers.0.self_attn.q_proj say 4 bits",
    ),
    "unknown dtype": (tensors, {"torch_dtype": "flot16"}, "oddities", "unknown dtype 'flot16'"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_each_oddity_is_told(tmp_path, name):
    make, changes, kind, words = ODD[name]
    found = summarize(open_checkpoint(model(tmp_path / "m", make(), **changes)))
    assert any(words in text for text in getattr(found, kind)), found


def test_a_folder_without_config(tmp_path):
    (tmp_path / "m").mkdir()
    save_file(tensors(), str(tmp_path / "m" / "model.safetensors"))
    found = summarize(open_checkpoint(tmp_path / "m"))
    assert found.architecture is None
    assert any("no config.json" in text for text in found.oddities)
    single = summarize(open_checkpoint(tmp_path / "m" / "model.safetensors"))
    assert single.n_parameters == found.n_parameters


def test_matrices_without_elements_have_no_shares(tmp_path):
    empty = {"a": torch.empty(0, 3), "b": torch.empty(0, 3, dtype=torch.float16)}
    torch.save(empty, tmp_path / "m.pt")
    assert not any("several dtypes" in text for text in summarize(open_checkpoint(tmp_path / "m.pt")).oddities)


def test_malformed_tokenizer_is_a_problem(tmp_path):
    folder = model(tmp_path / "m", tensors(), n_tokens=None)
    (folder / "tokenizer.json").write_text("{")
    assert any("tokenizer.json is not valid JSON" in text for text in summarize(open_checkpoint(folder)).problems)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", ("heads 4 × 8 (kv 2)",)),
        ("deepseek3", ("heads 4 × 16 (4 rotated, values 8, latent 16 + 4)", "experts 8 × 16 (3 a token)")),
        ("falcon_h1", ("heads 4 × 8 (kv 2), state space heads 6 × 8 × 8",)),
        ("lfm2", ("short convolution 32 × 3", "heads 4 × 8 (kv 2)")),
        ("mamba", ("state space 64 × 8",)),
        ("rwkv", ("time mix 32",)),
        ("rwkv5", ("heads 4 × 8",)),
        ("recurrent_gemma", ("gated recurrence 32", "heads 4 × 8 (kv 1)")),
        ("qwen3_5", ("DeltaNet keys 2 × 16, values 4 × 16", "heads 4 × 16 (kv 2)")),
    ],
)
def test_sizes_are_those_of_what_a_layer_is_made_of(family, said):
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == family))
    assert summarize(random_checkpoint(architecture, architecture.tiny_config())).mechanisms == said
