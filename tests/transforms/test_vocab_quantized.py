"""Vocabularies of quantized models: rows of embedding and head change, every byte of the quantized layers stays."""

from __future__ import annotations

import pytest
import torch
import vocab_world as world
from sentencepiece import SentencePieceProcessor

import llmkit
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.decoder import load_decoder
from llmkit.transforms import vocab
from llmkit.transforms.quantize import quantize
from tests.quantization.test_mxfp4 import published

WAYS = {
    "int4": {"bits": 4, "symmetric": True},
    "int4 asymmetric": {"bits": 4},
    "int8 with int8 inputs": {"bits": 8, "symmetric": True, "activations": "int8"},
    "int8 a row": {"bits": 8, "group_size": "channel"},
    "float8": {"bits": 8, "type": "fp8"},
    "gptq": {"bits": 4, "format": "gptq"},
    "gptq_v2": {"bits": 3, "format": "gptq_v2"},
    "awq": {"bits": 4, "format": "awq"},
    "nf4": {"bits": 4, "format": "bitsandbytes"},
    "int8 bitsandbytes": {"bits": 8, "format": "bitsandbytes"},
    "nested": {"bits": 4, "format": "bitsandbytes_nested"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    pieces = world.sp_model(world.ENGLISH, 360)
    (folder / "words.txt").write_text("quokka\nzebrafish\naxolotl\n")
    (folder / "corpus.txt").write_text("the other mother bothered her brother there\n")
    n = SentencePieceProcessor(model_proto=pieces).vocab_size()
    return world.model(folder / "m", n, world.sp_files(pieces), hidden=64), folder


def logits(ckpt, ids):
    floats = dequantized(ckpt) if describe(ckpt) else ckpt
    return load_decoder(floats, dtype="float32")(torch.tensor([ids]))[0]


@pytest.mark.parametrize("way", WAYS)
def test_layers_stay(base, tmp_path, way):
    ckpt, folder = base
    llmkit.save(quantize(ckpt, **WAYS[way]), tmp_path / "q")
    q = llmkit.open_checkpoint(tmp_path / "q")
    n = q["model.embed_tokens.weight"].shape[0]
    ids = [1, 5, 7, 300, 12]
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    for verb, change in {"larger": vocab.extend, "smaller": vocab.trim}.items():
        text = folder / ("words.txt" if verb == "larger" else "corpus.txt")
        llmkit.save(change(q, text), tmp_path / verb)
        after = llmkit.open_checkpoint(tmp_path / verb)
        assert after.tensors.keys() == q.tensors.keys()
        assert describe(after) == describe(q)
        assert {t for t, lazy in q.tensors.items() if not torch.equal(lazy.load(), after[t].load())} == rows
        if verb == "larger":
            assert after.config["vocab_size"] > n
            assert torch.equal(logits(after, ids)[:, :n], logits(q, ids))


def test_experts_in_mxfp4_stay(base, tmp_path):
    folder = published(tmp_path, vocab_size=300)
    n = llmkit.open_checkpoint(folder).config["vocab_size"]
    (folder / "tokenizer.json").write_text(world.byte_level(world.ENGLISH, n))
    q = llmkit.open_checkpoint(folder)
    larger = vocab.extend(q, base[1] / "words.txt")
    changed = {t for t, lazy in q.tensors.items() if not torch.equal(lazy.load(), larger[t].load())}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(logits(larger, [1, 5, 7])[:, :n], logits(q, [1, 5, 7]))
