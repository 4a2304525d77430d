"""Byte strings as GGUF spells them, and back; in llama.cpp: test_in_llama_cpp.py."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_byte_trie import FILE, TOKENS, longest_first

from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError
from llmkit.tokenization.byte_strings import escaped, unescaped
from llmkit.tokenization.byte_trie import ByteTrie
from llmkit.tokenization.from_gguf import reader_of, tokenizer_files
from llmkit.tokenization.published import build_tokenizer, choose_kind
from llmkit.tokenization.to_gguf import vocabulary_metadata

NAME = "rwkv_vocab_v20230424.txt"
KEY = "tokenizer.ggml."
TEXTS = ["abcd 人工智能 the\n\n", "'it\\'s' \"\\n\" \\x41", "é\t\r\n\x00", ""]


def metadata_of(*, added="{}", n_rows=400):
    files = {NAME: FILE.encode(), "added_tokens.json": added.encode()}
    return vocabulary_metadata("m", {n: FileContent(data=d) for n, d in files.items()}, {"bos_token_id": 0}, n_rows)


@pytest.mark.parametrize(
    ("token", "text"),
    [(b"a b", "a b"), (b"\xe4\xba", r"\xe4\xba"), (b"a\n\t\r", r"a\n\t\r"), (rb"\n", r"\\n"), (b"'", "'"),
     (b"\"'", "\"\\'"), (b"\x00\x7f", r"\x00\x7f")],
)  # fmt: skip
def test_the_spelling_is_llama_cpps(token, text):
    assert escaped(token) == text
    assert unescaped(text) == token


@given(st.binary())
def test_every_token_comes_back(token):
    assert escaped(token).isascii()
    assert unescaped(escaped(token)) == token


def test_other_characters_are_their_utf_8():
    assert unescaped("人\\工") == "人工".encode()


def test_there_and_back():
    metadata, warnings = metadata_of(added=json.dumps({"<|pad|>": 300, "\\n": 301}))
    tokens, types = metadata[f"{KEY}tokens"], metadata[f"{KEY}token_type"]
    n = len(TOKENS)
    assert warnings == []
    assert metadata[f"{KEY}model"] == "rwkv"
    assert f"{KEY}scores" not in metadata
    assert types == [3, *[1] * n, *[5] * (300 - n - 1), 3, 3, *[5] * 98]
    assert [tokens[0], tokens[300], tokens[301], tokens[399]] == ["<|endoftext|>", "<|pad|>", "\\\\n", "[PAD399]"]
    ids = {name: metadata[f"{KEY}{name}_token_id"] for name in ("bos", "eos", "eot")}
    assert ids == {"bos": 0, "eos": 0, "eot": TOKENS.index(b"\n\n") + 1}
    files = tokenizer_files(metadata, {})
    again = ByteTrie.parse(files[NAME].read(), NAME)
    assert again.tokens == ByteTrie.parse(FILE.encode(), NAME).tokens
    settings = json.loads(files["tokenizer_config.json"].read())
    assert settings["eos_token"] == "<|endoftext|>"
    added = {i: token["content"] for i, token in settings["added_tokens_decoder"].items()}
    assert added == {"0": "<|endoftext|>", "300": "<|pad|>", "301": "\\n"}
    expected = [longest_first(text.encode()) for text in TEXTS]
    assert [again.encode(text) for text in TEXTS] == expected
    assert [reader_of(metadata)(text) for text in TEXTS] == expected


def test_a_vocabulary_without_all_bytes_is_named():
    metadata, _ = metadata_of()
    metadata[f"{KEY}token_type"][66] = 5
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens has no token for the byte 0x41"):
        tokenizer_files(metadata, {})[NAME].read()


def test_files_of_llama_cpps_own_converter():
    """They call the first token <s>, and may end a text at a blank line."""
    metadata, _ = metadata_of()
    metadata[f"{KEY}tokens"][0], blank_line = "<s>", metadata[f"{KEY}eot_token_id"]
    files = tokenizer_files({**metadata, f"{KEY}eos_token_id": blank_line}, {})
    settings = json.loads(files["tokenizer_config.json"].read())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "\n\n")
    contents = {name: file.read() for name, file in files.items()}
    kind = choose_kind(settings, contents)
    tokenizer = build_tokenizer(kind, contents, settings, {}, "m")
    assert tokenizer.encode(TEXTS[0], add_special_tokens=False) == longest_first(TEXTS[0].encode())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, blank_line)


def test_tokens_beyond_the_embedding_are_said():
    _, warnings = metadata_of(n_rows=len(TOKENS))
    assert warnings == ["1 tokens have no row in the embedding and are left out of the vocabulary"]
