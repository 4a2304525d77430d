"""How many tokens a tokenizer has that was published with code: as many as the tokenizer made from it says."""

from __future__ import annotations

import base64
import json

import pytest

from llmkit.architecture.tokenizers import published_tokenizers
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.errors import InputError
from llmkit.tokenization.vocabulary import read_vocabulary

TRIE = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)) + "300 'ab' 2\n"
RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def ckpt(name, data, **settings):
    files = {name: data, "tokenizer_config.json": json.dumps(settings).encode()}
    return Checkpoint("m", {}, {}, {n: FileContent(data=d) for n, d in files.items()})


def test_the_count_is_that_of_the_tokenizer(world):
    plain = world.sp_model(world.ENGLISH, 420)
    ice = published_tokenizers()["ice-text"]
    whole = world.sp_model(
        world.ENGLISH, 560, control_symbols=list(ice.reserved), user_defined_symbols=list(ice.appended)
    )
    for made, kind, n_added in (
        (ckpt("tokenizer.model", plain, tokenizer_class="ChatGLMTokenizer"), "SentencePiece", 9),
        (ckpt("ice_text.model", whole, num_image_tokens=20000, pad_token="<s>"), "SentencePiece", 0),
        (ckpt("tokenizer.model", RANKS, tokenizer_class="ChatGLM4Tokenizer"), "tiktoken", 14),
        (ckpt("rwkv_vocab_v20230424.txt", TRIE.encode()), "byte trie", 0),
        (ckpt("tokenizer.model", plain, tokenizer_class="LlamaTokenizer"), "SentencePiece", 0),
    ):
        found = read_vocabulary(made)
        assert (found.kind, found.n_added) == (kind, n_added)
        assert found.n_tokens == len(load_tokenizer(made))


def test_a_file_that_ends_otherwise():
    with pytest.raises(InputError, match=r"m: rwkv_vocab_v20230424.txt: the last line does not begin with an id"):
        read_vocabulary(ckpt("rwkv_vocab_v20230424.txt", TRIE.encode() + b"trunc"))


def test_a_file_that_is_made_is_made_once():
    made = []
    document = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    content = FileContent(make=lambda: made.append(1) or json.dumps(document).encode())
    vocabulary = read_vocabulary(Checkpoint("m.gguf", {}, {}, {"tokenizer.json": content}))
    assert (vocabulary.n_tokens, len(made)) == (2, 1)
