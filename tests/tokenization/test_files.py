"""Which file of a tokenizer is what, and the tokens that files add, held to transformers."""

from __future__ import annotations

import json

import transformers
from tokenizers import AddedToken, Tokenizer, models

from llmkit.checkpoint.file_content import FileContent
from llmkit.formats.tokenizer_files import TOKENIZER_FILES, VOCABULARIES, FileKind
from llmkit.tokenization.bundle import read_tokenizer

CLASSES = ("LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer", "XLMRobertaTokenizer", "BertTokenizer", "XLNetTokenizer")


def test_the_files_of_transformers_classes_are_known():
    named = {file for c in CLASSES for file in getattr(transformers, c).vocab_files_names.values()}
    assert "vocab.txt" in named  # transformers 4 names tokenizer.json elsewhere
    assert named <= set(TOKENIZER_FILES)
    assert VOCABULARIES["tokenizer.json"] is FileKind.FAST
    assert not {"merges.txt", "added_tokens.json", "tokenizer_config.json"} & VOCABULARIES.keys()


def test_added_tokens_of_all_files(tmp_path):
    """tokenizer.json has the last word, then tokenizer_config.json, then added_tokens.json."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.add_special_tokens([AddedToken("<s>", special=True)])
    made.add_tokens([AddedToken("word", lstrip=True, normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {
        "2": {"content": "<s>", "special": True}, "4": {"content": "<end>", "special": True}}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).added_tokens_decoder
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": 4, "<more>": 5}))
    found = read_tokenizer("m", {p.name: FileContent(path=p) for p in tmp_path.iterdir()})
    assert {i: t["content"] for i, t in found.added.items()} == {
        **{i: t.content for i, t in theirs.items()}, 4: "<end>", 5: "<more>"}  # fmt: skip
    for i, token in theirs.items():
        assert found.added[i].get("special", False) == token.special
        assert found.added[i].get("lstrip", False) == token.lstrip
    assert found.n_tokens == 6
