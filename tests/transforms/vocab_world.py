"""Tiny tokenizers trained in milliseconds, and models that carry them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import delta_world as world
import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.tokenization.bpe import implied_merges
from llmkit.tokenization.sentencepiece_model import SentencePieceModel

ENGLISH = [
    "the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore", "a stitch in time saves",
    "the other mother bothered her brother there", "in 1970 and 1971 there were 197 of them", "over and over again",
    "def add(x, y): return x + y", "for i in range(10): print(i)", "this is the thing that they think of then",
] * 4  # fmt: skip
CHINESE = [
    "人工智能的发展正在改变世界", "工人在工厂里工作", "中国人民热爱和平与发展", "今天天气很好我们去公园",
    "世界和平是人民的愿望", "发展中国家的工作人员", "他在1970年的公园里工作", "智能工厂改变人们的工作",
] * 6  # fmt: skip
SPECIALS = ["<unk>", "<s>", "</s>"]


def sp_model(lines: list[str], size: int, *, model_type: str = "bpe", **options: object) -> bytes:
    """A SentencePiece model with byte fallback, as LLaMA's: identity normalization, spaces kept."""
    out = io.BytesIO()
    settings = {
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "character_coverage": 1.0, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2,
    } | options  # fmt: skip
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, model_type=model_type, **settings
    )
    return out.getvalue()


def fast_of(model: bytes) -> str:
    """The tokenizer.json of a SentencePiece BPE model, laid out as transformers' converter does for LLaMA."""
    sp = SentencePieceModel.parse(model, "test")
    merges = implied_merges(sp.scores, sp.ids)
    bpe = models.BPE(vocab=dict(sp.ids), merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer.to_str()


def byte_level(lines: list[str], size: int, specials: list[str] | None = None) -> str:
    """The tokenizer.json of a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials or [],
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str()


def model(
    folder: Path, n_rows: int, files: dict[str, str | bytes], *, tied: bool = False, **extra: object
) -> Checkpoint:
    """A tiny model with these tokenizer files."""
    state = world.weights(n_rows, **{k: extra.pop(k) for k in ("hidden", "seed", "dtype") if k in extra})
    if tied:
        del state["lm_head.weight"]
    world.save(folder, state, tie_word_embeddings=tied, **extra)
    for name, data in files.items():
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return open_checkpoint(folder)


def sp_files(data: bytes, *, fast: bool = True) -> dict[str, str | bytes]:
    """tokenizer.model, tokenizer.json and their config."""
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in enumerate(SPECIALS)},
    }  # fmt: skip
    files: dict[str, str | bytes] = {"tokenizer.model": data, "tokenizer_config.json": json.dumps(config)}
    return files | ({"tokenizer.json": fast_of(data)} if fast else {})


def rows(ckpt: Checkpoint, name: str = "model.embed_tokens.weight") -> torch.Tensor:
    return ckpt.tensors[name].load()


def appended(data: bytes, pieces: list[str]) -> bytes:
    """A merged model made with nothing of llmkit: records of field 1 put at the end, as protobuf allows."""
    out = bytearray(data)
    for piece in pieces:
        text = piece.encode()
        assert len(text) < 110
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x00\x00"
        out += b"\x0a" + bytes([len(body)]) + body
    return bytes(out)
