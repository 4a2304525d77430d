"""A tiny random model with a tiny byte-level tokenizer, saved by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizer import train_tokenizer


def save_tiny_llama(folder: Path, *, max_length: int = 96, scale: float = 0.3) -> None:
    """A seeded two-layer Llama, wide enough in its weights that choices differ clearly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=380,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=scale,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).eval().save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder: model and tokenizer without a beginning token."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model; its tokenizer puts <s> in front, as LLaMA's does."""
    folder = tmp_path_factory.mktemp("tiny-llama-bos")
    save_tiny_llama(folder)
    train_tokenizer(folder, bos=True)
    return folder
