"""The added tokens of `--with OTHER`: plain ones come along as transformers' `add_tokens` enters them."""

from __future__ import annotations

import json

import pytest
import transformers
import vocab_world as world
from tokenizers import AddedToken, Tokenizer

import llmkit
from llmkit.transforms import vocab

PLAIN = [
    AddedToken("<think>", normalized=False), AddedToken("quokka", single_word=True, normalized=False),
    AddedToken("<pad_left>", lstrip=True, normalized=False), AddedToken("brown fox", rstrip=True),
]  # fmt: skip
TEXTS = [
    "a<think> b", "quokkas quokka, quokka", "to the  <pad_left> left", "the quick brown fox  jumps",
    "人工智能 <think>人工",
    "  <|zh|> <role>", "brown foxes<pad_left>",
]  # fmt: skip
CONFIG = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})


def byte_level(folder):
    text = world.byte_level(world.ENGLISH, 380, ["<|end|>"])
    return world.model(folder, Tokenizer.from_str(text).get_vocab_size(), {
        "tokenizer.json": text, "tokenizer_config.json": CONFIG,
    }, hidden=16)  # fmt: skip


def sentencepiece(folder):
    model = world.sp_model(world.ENGLISH, 360)
    fast = Tokenizer.from_str(world.fast_of(model))
    fast.add_tokens(["<old>"])  # behind the pieces: it moves
    files = world.sp_files(model) | {"tokenizer.json": fast.to_str(), "tokenizer_config.json": CONFIG}
    return world.model(folder, fast.get_vocab_size(), files, hidden=16)


def other(folder, added, special=()):
    """A tokenizer of Chinese, whose added tokens are a special one and plain ones."""
    tokenizer = Tokenizer.from_str(world.byte_level(world.CHINESE, 420, ["<|zh|>"]))
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.mark.parametrize("base", [byte_level, sentencepiece])
def test_ids_are_those_of_transformers(tmp_path, base):
    ckpt = base(tmp_path / "base")
    llmkit.save(vocab.extend(ckpt, other(tmp_path / "plain", [])), tmp_path / "without")
    extended = vocab.extend(ckpt, other(tmp_path / "more", PLAIN, ["<role>"]), init="pieces")
    llmkit.save(extended, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "without")
    n_before = len(theirs)
    assert theirs.add_tokens(PLAIN) == len(PLAIN)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    assert ours.convert_tokens_to_ids("<think>") == n_before
    rows = llmkit.open_checkpoint(tmp_path / "out").tensors["model.embed_tokens.weight"].load()
    assert rows.shape[0] == len(ours)
    assert rows[n_before:].abs().sum(1).gt(0).all()
    (said,) = [note for note in extended.notes if "special tokens" in note]
    assert said.startswith("special tokens of tokenizer.json are left out")
    assert "<|zh|>" in said
    assert "<role>" in said


def test_what_both_have_comes_once(tmp_path):
    ckpt = byte_level(tmp_path / "base")
    out = vocab.extend(ckpt, other(tmp_path / "other", ["<|end|>", "<think>"]))
    (said,) = [note for note in out.notes if "added token at ids" in note]
    assert "1 added token at ids" in said
    assert "(1 of 2 were there already)" in said
    again = vocab.extend(out, other(tmp_path / "second", ["<more>"]), as_="added")
    names = [t["content"] for t in json.loads(again.files["tokenizer.json"].read())["added_tokens"]]
    assert names.count("<think>") == 1
    assert "<more>" in names
