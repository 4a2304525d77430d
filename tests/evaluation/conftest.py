"""A tiny random model with a tiny byte-level tokenizer, saved by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = (
    "The following are multiple choice questions (with answers) about small things.\n\n"
    "Which of these is a fruit?\nA. stone\nB. apple\nC. river\nD. 0.50\nAnswer: B\n\n"
    "How many legs has a spider?\nA. 6\nB. 8\nC. None\nD. 10\nAnswer: B\n\n"
    "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n答案：A\n"
)


def train_tokenizer(folder: Path, *, bos: bool = False) -> None:
    """A byte-level BPE tokenizer of a few hundred pieces; with `bos` it puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([WORDS] * 3, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)


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
