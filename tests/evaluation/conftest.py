"""A tiny random model with a tiny byte-level tokenizer, saved by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import save_tiny_llama
from tiny_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder: model and tokenizer without a beginning token."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny_llama: Path):
    """The same in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def decoder(tiny_llama: Path):
    """The same in llmkit."""
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.decoder import load_decoder

    return load_decoder(open_checkpoint(tiny_llama))


@pytest.fixture(scope="session")
def tiny_llama_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model; its tokenizer puts <s> in front, as LLaMA's does."""
    folder = tmp_path_factory.mktemp("tiny-llama-bos")
    save_tiny_llama(folder)
    train_tokenizer(folder, bos=True)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 1,500 tokens, for prompts of several shots."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, max_length=1500)
    train_tokenizer(folder)
    return folder
