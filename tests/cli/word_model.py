"""A tiny model whose tokens are words."""

from __future__ import annotations

import json
from pathlib import Path


def write_model(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """A random llama-layout model of 130 tokens with a word-level tokenizer, written by safetensors and tokenizers."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 130,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float32", **changes,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"model.embed_tokens.weight": rand(130, 64), "lm_head.weight": rand(130, 64)}
    tensors["model.norm.weight"] = torch.ones(64)
    for i in range(2):
        block = f"model.layers.{i}."
        tensors[block + "input_layernorm.weight"] = torch.ones(64)
        tensors[block + "post_attention_layernorm.weight"] = torch.ones(64)
        for name, rows, columns in (
            ("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 32, 64), ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64), ("mlp.gate_proj", 96, 64), ("mlp.up_proj", 96, 64), ("mlp.down_proj", 64, 96),
        ):  # fmt: skip
            tensors[f"{block}{name}.weight"] = rand(rows, columns)
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(127))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"})
    )
    return folder
