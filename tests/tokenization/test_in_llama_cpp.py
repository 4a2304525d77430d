"""llama.cpp cuts texts as the tokenizer that its vocabulary was made from: every named pre-tokenizer, SentencePiece.

Needs a Python that has llama-cpp-python (it compiles for minutes): LLMKIT_LLAMA_CPP=/path/to/python pytest …
"""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from llmkit.checkpoint.file_content import FileContent
from llmkit.tokenization.byte_strings import vocabulary_file
from llmkit.tokenization.byte_trie import ByteTrie
from llmkit.tokenization.from_gguf import reader_of
from llmkit.tokenization.parity import TEXTS
from llmkit.tokenization.pretokenizers import NAMES, pre_tokenizer_of
from llmkit.tokenization.to_gguf import vocabulary_metadata

PYTHON = os.environ.get("LLMKIT_LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set LLMKIT_LLAMA_CPP to a Python with llama_cpp"),
]
CUT = """
import sys, json, pathlib, llama_cpp
found = {}
for path in json.loads(sys.argv[1]):
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    found[pathlib.Path(path).stem] = [
        model.tokenize(text.encode(), add_bos=False, special=False) for text in json.loads(sys.argv[2])
    ]
print(json.dumps(found))
"""
READ = [text for text in TEXTS if text]
# llama.cpp's patterns for these leave combining marks (\p{M}) out of words.
MARKS = {"tekken": ["cafe\u0301 n\u0303 A\u030a", "नमस्ते दुनिया", "สวัสดีชาวโลก"]}
MARKS["gpt-4o"] = MARKS["tekken"]
MERGES = "gemma4"  # pieces of SentencePiece, and the merges of tokenizer.json instead of scores
# llama.cpp cuts them at the ends of lines, and here finds no special tokens in text.
MARKS[MERGES] = ["\ta\n\tb\n", "<s>", "</s>", "<unk>"]
MARKS_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # and puts none before a text
BYTES = "byte-strings"  # all bytes, and words of the texts with the space before them
PREFIXES = {"spm": True, "spm-without-prefix": False}


def trained(name):
    """A tokenizer.json of byte-level BPE, trained on the texts themselves so that words are whole tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    document = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": pre_tokenizer_of(name)}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(READ, trainer)
    return tokenizer


def gguf_file(path, metadata):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            kinds[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture(scope="module")
def cut(tmp_path_factory, world):
    """Name -> (ids by the tokenizers or the sentencepiece library, ids by llama.cpp), of each text."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    folder, expected = tmp_path_factory.mktemp("vocabularies"), {}
    for name in NAMES:
        tokenizer = trained(name)
        expected[name] = [tokenizer.encode(text).ids for text in READ]
        files = {"tokenizer.json": FileContent(data=tokenizer.to_str().encode())}
        metadata, warnings = vocabulary_metadata("m", files, {}, tokenizer.get_vocab_size(), pre=name)
        assert (warnings, metadata["tokenizer.ggml.pre"]) == ([], name)
        gguf_file(folder / f"{name}.gguf", metadata)
    for name, prefix in PREFIXES.items():
        data = world.sp_model([*world.ENGLISH, *world.CHINESE, *READ], 900, add_dummy_prefix=prefix)
        exact = SentencePieceProcessor(model_proto=data)
        expected[name] = [exact.encode(text) for text in READ]
        metadata, warnings = vocabulary_metadata("m", {"tokenizer.model": FileContent(data=data)}, {}, len(exact))
        assert warnings == []
        gguf_file(folder / f"{name}.gguf", metadata)
    fast = world.fast_of(world.sp_model([*world.ENGLISH, *world.CHINESE, *READ], 900, add_dummy_prefix=False))
    fast = json.dumps(json.loads(fast) | {"normalizer": MARKS_SPACES})
    expected[MERGES] = [Tokenizer.from_str(fast).encode(text, add_special_tokens=False).ids for text in READ]
    metadata, _ = vocabulary_metadata("m", {"tokenizer.json": FileContent(data=fast.encode())}, {}, 900)
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(fast)["model"]["merges"]]
    metadata |= {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": merges}
    gguf_file(folder / f"{MERGES}.gguf", metadata)
    words = sorted({word for text in READ for word in re.findall(r" ?\S+|\s+", text) if len(word.encode()) > 1})
    trie = ByteTrie(dict(enumerate([*(bytes([b]) for b in range(256)), *(word.encode() for word in words)], 1)))
    expected[BYTES] = [trie.encode(text) for text in READ]
    files = {"rwkv_vocab_v20230424.txt": FileContent(data=vocabulary_file(trie.tokens))}
    metadata, warnings = vocabulary_metadata("m", files, {}, trie.n_tokens + 5)
    assert warnings == []
    assert [reader_of(metadata)(text) for text in READ] == expected[BYTES]
    gguf_file(folder / f"{BYTES}.gguf", metadata)
    paths = [str(folder / f"{name}.gguf") for name in expected]
    done = subprocess.run(
        [PYTHON, "-c", CUT, json.dumps(paths), json.dumps(READ)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    return {name: (expected[name], found[name]) for name in expected}


@pytest.mark.parametrize("name", [*NAMES, *PREFIXES, MERGES, BYTES])
def test_the_ids_are_the_same(cut, name):
    expected, found = cut[name]
    assert [text for text, a, b in zip(READ, expected, found, strict=True) if a != b] == MARKS.get(name, [])
