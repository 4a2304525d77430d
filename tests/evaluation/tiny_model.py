"""A tiny seeded Llama, saved by transformers."""

from __future__ import annotations

from pathlib import Path


def save_tiny_llama(folder: Path, *, max_length: int = 96, scale: float = 0.3, n_vocab: int = 380) -> None:
    """A seeded two-layer Llama, wide enough in its weights that choices differ clearly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=n_vocab,
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
