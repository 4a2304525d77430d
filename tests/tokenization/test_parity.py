"""Made tokenizers against sentencepiece on the hard set, and what is said where they cannot be equal."""

from __future__ import annotations

import json

import pytest
from sentencepiece import SentencePieceProcessor

import llmkit
from llmkit.architecture.tokenizers import published_tokenizers
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.tokenization.from_gguf import tokenizer_files
from llmkit.tokenization.parity import TEXTS, compare, tied_texts
from llmkit.tokenization.pieces_tokenizer import tokenizer_of_pieces
from llmkit.tokenization.sentencepiece_model import Piece, PieceKind, SentencePieceModel
from llmkit.tokenization.to_fast import fast_files
from llmkit.tokenization.to_gguf import vocabulary_metadata
from llmkit.transforms.convert import convert
from llmkit.transforms.vocab.info import info, open_tokenizer
from llmkit.transforms.vocab.sources import read_source

CYCLE = ("ab", "bc", "ca")  # ties that no list of merges orders rightly in every text
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}


def vocabulary(data, n_rows=None):
    sp = SentencePieceModel.parse(data, "test")
    files = {"tokenizer.model": FileContent(data=data),
             "tokenizer_config.json": FileContent(data=json.dumps(SETTINGS).encode())}  # fmt: skip
    return vocabulary_metadata("m", files, {}, n_rows or len(sp.pieces))


@pytest.fixture(scope="module")
def tied(world):
    """LLaMA's kind of model, with pieces of score 0 behind, as merged vocabularies have them."""
    model = SentencePieceModel.parse(world.sp_model([*world.ENGLISH, *"abc"], 360), "test")
    return model.extended(Piece(t, 0.0) for t in CYCLE if t not in model.ids).serialized()


def spaced(world, prefix):
    """Gemma's kind: runs of spaces are pieces of their own."""
    return world.sp_model(world.ENGLISH, 380, add_dummy_prefix=prefix, user_defined_symbols=["▁▁", "▁▁▁", "<n>"])


def test_the_hard_set_is_of_many_kinds():
    assert "" in TEXTS
    assert len(set(TEXTS)) == len(TEXTS) > 90


@pytest.mark.parametrize("which", ["tied", "spaced", "spaced, no prefix"])
def test_the_tokenizer_of_a_gguf_is_sentencepieces(world, tied, which):
    data = tied if which == "tied" else spaced(world, "no" not in which)
    exact = SentencePieceProcessor(model_proto=data)
    metadata, warnings = vocabulary(data)
    assert warnings == []
    if which != "tied":  # as other programs store user-defined pieces
        tokens = metadata["tokenizer.ggml.tokens"]
        metadata["tokenizer.ggml.tokens"] = [" " * len(t) if len(t) > 1 and set(t) == {"▁"} else t for t in tokens]
    files = tokenizer_files(metadata, {})
    ours = tokenizer_of_pieces(files["tokenizer.model"].read(), SETTINGS, "m")
    for text in (*TEXTS, "cab", "abcabc", "x <n>y"):
        assert ours(text, add_special_tokens=False)["input_ids"] == exact.encode(text), text


def test_a_list_of_merges_that_differs_is_said(tied):
    file = tokenizer_files(vocabulary(tied)[0], {})["tokenizer.json"]
    said = file.check(file.read())
    assert said.startswith("tokenizer.json, made from the vocabulary of the GGUF file: ")
    assert "test texts get other ids" in said


@pytest.mark.parametrize("prefix", [True, False])
def test_a_list_of_merges_that_does_not_differ_is_not(world, prefix):
    for data in (world.sp_model(world.ENGLISH, 400, add_dummy_prefix=prefix), spaced(world, False)):
        file = tokenizer_files(vocabulary(data)[0], {})["tokenizer.json"]
        assert file.check(file.read()) is None


def test_published_tokenizers_are_compared_before_they_are_written(world, tied):
    kind = published_tokenizers()["glm-sentencepiece"]
    for data, is_said in ((tied, True), (world.sp_model(world.ENGLISH + world.CHINESE, 480), False)):
        made = fast_files(kind, {kind.file: FileContent(data=data)}, {}, {}, "m")["tokenizer.json"]
        said = made.check(made.read())
        assert (said is not None) is is_said
        assert said is None or said.startswith("tokenizer.json, made from tokenizer.model, which is exact: ")


def test_what_an_engine_cuts_otherwise_is_said(world):
    trimmed = world.sp_model(world.ENGLISH, 400, remove_extra_whitespaces=True)
    (said,) = vocabulary(trimmed)[1]
    assert said.startswith("llama.cpp cuts text otherwise than tokenizer.model: ")
    document = json.loads(world.byte_level(world.ENGLISH, 400))
    document["normalizer"] = {"type": "NFC"}
    files = {"tokenizer.json": FileContent(data=json.dumps(document).encode())}
    (said,) = vocabulary_metadata("m", files, {}, 400)[1]
    assert said.startswith("llama.cpp cuts text otherwise than tokenizer.json: ")


def test_ids_and_an_example_are_told():
    found = compare(lambda text: [len(text)], lambda text: [len(text) % 7], more=["x" * 8])
    assert (len(found.text), found.expected, found.found) == (7, (7,), (0,))
    assert f"{found.n} of {found.n_texts} test texts get other ids (" in str(found)
    assert compare(lambda text: [1], lambda text: [1]) is None


def test_chains_of_ties(tied):
    texts = tied_texts(SentencePieceModel.parse(tied, "test").scores)
    assert {"abca", "bcab", "cabc"} & set(texts)
    assert tied_texts({"ab": 0.0, "bc": -1.0}) == []


@pytest.fixture(scope="module")
def folder(world, tied, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    n = len(SentencePieceModel.parse(tied, "test").pieces)
    ckpt = world.model(path / "m", n, {"tokenizer.model": tied, "tokenizer_config.json": json.dumps(SETTINGS)})
    llmkit.save(convert(ckpt, to="gguf"), path / "g")
    return path / "g"


def test_a_gguf_folder_serves_as_a_tokenizer(folder, tied):
    n = len(SentencePieceModel.parse(tied, "test").pieces)
    of_file = info(open_tokenizer(next(folder.glob("*.gguf"))))
    assert {**info(open_tokenizer(folder)), "label": ""} == {**of_file, "label": ""}
    assert of_file["n_tokens"] == n
    kinds = [p.kind for p in SentencePieceModel.parse(tied, "test").pieces]
    source = read_source(folder)
    assert len(source.entries) == sum(k in (PieceKind.NORMAL, PieceKind.CONTROL) for k in kinds)


def test_every_command_opens_the_exact_tokenizer_of_a_gguf(folder, tied):
    exact = SentencePieceProcessor(model_proto=tied)
    ckpt = llmkit.open_checkpoint(folder)
    for text in ("abc", "bca", "cab", "the <s> fox"):
        assert load_tokenizer(ckpt)(text)["input_ids"] == exact.encode(text)
    assert any("made from the vocabulary of the GGUF" in w for w in llmkit.plan(convert(ckpt, to="hf"), "z").warnings)
