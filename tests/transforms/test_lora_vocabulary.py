"""Adapters that bring a vocabulary: rows, config and tokenizer change in one step, or it is refused."""

from __future__ import annotations

import json

import peft_world as world
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import RequirementError, SpecError
from llmkit.transforms.lora import merge, open_adapter
from tests.transforms.test_lora_bases import IDS, Q, config_of

# Vocabularies.


def tokenizer(n):
    vocab = {f"t{i}": i for i in range(n)}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}})


def with_tokenizer(folder, n):
    (folder / "tokenizer.json").write_text(tokenizer(n))
    return folder


def grown(folder, base_model, rows, n_tokens=None, seed=1):
    """An adapter trained after the vocabulary grew to `rows`, saved with embedding, head and its tokenizer."""
    import copy

    model = copy.deepcopy(base_model)
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=Q, modules_to_save=["embed_tokens", "lm_head"])
    world.train(model, config, folder, seed=seed)
    return with_tokenizer(folder, rows if n_tokens is None else n_tokens)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    """A base of 72 tokens; adapters of LLaMA type (90) and of Alpaca type (91, one padding token more)."""
    folder = tmp_path_factory.mktemp("chinese")
    model = world.llama()
    with_tokenizer(world.save_base(model, folder / "base"), 72)
    grown(folder / "llama-lora", model, 90)
    grown(folder / "alpaca-lora", model, 91, seed=2)
    return folder


def test_a_larger_vocabulary_changes_everything_in_one_step(chinese, tmp_path):
    made = merge(open_checkpoint(chinese / "base"), [open_adapter(chinese / "llama-lora")])
    assert made.tensors["model.embed_tokens.weight"].shape == (90, 32)
    assert made.tensors["lm_head.weight"].shape == (90, 32)
    assert made.config["vocab_size"] == 90
    assert made.files["tokenizer.json"].read() == tokenizer(90).encode()
    assert any("72 to 90 rows" in n for n in made.notes)
    llmkit.save(made, tmp_path / "out")
    assert world.folder_logits(tmp_path / "out", IDS).shape == (2, 10, 90)


def test_two_step_merge_equals_two_merges_through_disk(chinese, tmp_path):
    adapters = [open_adapter(chinese / n) for n in ("llama-lora", "alpaca-lora")]
    llmkit.save(merge(open_checkpoint(chinese / "base"), adapters), tmp_path / "once")
    llmkit.save(merge(open_checkpoint(chinese / "base"), adapters[:1]), tmp_path / "first")
    llmkit.save(merge(open_checkpoint(tmp_path / "first"), adapters[1:]), tmp_path / "second")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert config_of(tmp_path / "once")["vocab_size"] == 91


def test_the_wrong_order_is_refused_with_the_counts(chinese):
    adapters = [open_adapter(chinese / n) for n in ("alpaca-lora", "llama-lora")]
    with pytest.raises(RequirementError, match=r"90 rows; .* has 91 rows and a tokenizer of 91 tokens") as caught:
        merge(open_checkpoint(chinese / "base"), adapters)
    assert "smallest first" in caught.value.hint


def test_the_tokenizer_of_another_release_is_refused_with_the_counts(chinese, tmp_path):
    mixed = grown(tmp_path / "mixed", world.llama(), 91, n_tokens=90)
    with pytest.raises(RequirementError, match="embedding has 91 rows, the tokenizer beside it 90 tokens") as caught:
        merge(open_checkpoint(chinese / "base"), [open_adapter(mixed)])
    assert "published with this adapter" in caught.value.hint
    made = merge(open_checkpoint(chinese / "base"), [open_adapter(mixed)], force=True)
    assert made.warnings[0].startswith("forced: ")


def test_no_tokenizer_for_new_rows_is_refused(chinese, tmp_path):
    adapter = grown(tmp_path / "a", world.llama(), 80)
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(RequirementError, match="80 rows, the model has 72, and there is no tokenizer beside"):
        merge(open_checkpoint(chinese / "base"), [open_adapter(adapter)])


def test_padded_rows_are_told_from_a_mix_up(chinese, tmp_path):
    adapter = grown(tmp_path / "a", world.llama(), 96, n_tokens=91)
    made = merge(open_checkpoint(chinese / "base"), [open_adapter(adapter)])
    assert made.config["vocab_size"] == 96
    assert any("5 rows are padding" in n for n in made.notes)


def test_rows_that_were_padding_may_go(tmp_path):
    base = with_tokenizer(world.save_base(world.llama(vocab=80), tmp_path / "base"), 75)
    adapter = grown(tmp_path / "a", world.llama(), 75)
    made = merge(open_checkpoint(base), [open_adapter(adapter)])
    assert made.config["vocab_size"] == 75
    assert any("5 rows left out were padding" in n for n in made.notes)


def test_an_adapter_for_more_rows_than_the_base_has_says_so(chinese, tmp_path):
    world.train(world.llama(vocab=90), LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "a")
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if "base_layer" not in k}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(SpecError, match=r"update of lm_head is \[90, 32\]") as caught:
        merge(open_checkpoint(chinese / "base"), [open_adapter(tmp_path / "a")])
    assert "90 rows of vocabulary" in caught.value.hint


def test_resized_and_saved_embeddings_of_a_tied_model_stay_tied(tmp_path):
    import copy

    model = world.llama(tied=True)
    base = with_tokenizer(world.save_base(model, tmp_path / "base"), 72)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(77, mean_resizing=False)
    tuned = get_peft_model(larger, LoraConfig(r=2, target_modules=Q))
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with_tokenizer(tmp_path / "a", 77)
    made = merge(open_checkpoint(base), [open_adapter(tmp_path / "a")])
    assert made.config["tie_word_embeddings"] is True
    assert made.config["vocab_size"] == 77
    assert "lm_head.weight" not in made.tensors


def test_counts_of_the_real_chinese_tokenizers(shared):
    from llmkit.tokenization.vocabulary import count_pieces

    assert count_pieces((shared / "tokenizers" / "llama.model").read_bytes()) == 32_000
    assert count_pieces((shared / "tokenizers" / "chinese_sp.model").read_bytes()) == 20_000
