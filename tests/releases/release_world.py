"""Tiny coded releases, made by the published rules written out byte by byte here."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path

import torch

from llmkit.tokenization.sentencepiece_model import Piece, PieceKind, SentencePieceModel

SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
INDEX = "pytorch_model.bin.index.json"


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, 64)}
    for i in range(2):
        p = f"model.layers.{i}."
        found |= {f"{p}self_attn.{n}_proj.weight": (64, 64) for n in "qkvo"}
        found |= {f"{p}mlp.{n}_proj.weight": (96, 64) for n in ("gate", "up")}
        found[f"{p}mlp.down_proj.weight"] = (64, 96)
        found |= {f"{p}{n}_layernorm.weight": (64,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (64,), "lm_head.weight": (rows, 64)}


def normal(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random weights; a model with more rows begins with the same ones."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1000 * seed)
    return torch.randn((200, *shape[1:]), generator=g)[: shape[0]] * 0.02


def write_hf(folder: Path, *, rows: int = 96, seed: int = 0, tuned: int = 0, layers_first: int = 9) -> Path:
    """A model in two torch files with an index, as transformers wrote them in 2023.

    Args:
        tuned: moves every weight by 5 % of their size; 0 leaves them.
    """
    step = 0.05 if tuned else 0.0
    state = {n: (normal(n, s, seed) + step * normal(n, s, seed + 500 + tuned)).half() for n, s in shapes(rows).items()}
    names = list(state)
    parts = names[:layers_first], names[layers_first:]
    folder.mkdir(parents=True)
    for file, part in zip(SHARDS, parts, strict=True):
        # torch writes the name of the file into the zip: transformers wrote each shard under its final name.
        torch.save({n: state[n] for n in part}, folder / file)
    weight_map = {n: file for file, part in zip(SHARDS, parts, strict=True) for n in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": rows, "rms_norm_eps": 1e-6,
        "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_bytes(json.dumps(config, indent=2).encode() + b"\n")
    pieces = [Piece("<unk>", 0.0, PieceKind.UNKNOWN), *(Piece(f"w{seed}x{i}", -float(i)) for i in range(rows - 1))]
    model = SentencePieceModel(tuple(pieces), b"", "bpe", "", True, False, False)
    (folder / "tokenizer.model").write_bytes(model.serialized())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "llmkit.json"}


def xor_code(data: bytes, base: bytes) -> bytes:
    """The published XOR codec, one byte at a time; coding and decoding are the same."""
    return bytes(b ^ (base[i] if i < len(base) else 0) for i, b in enumerate(data))


def write_xor_payload(folder: Path, base: Path, tuned: Path, *, compress: bool = False) -> Path:
    folder.mkdir(parents=True)
    for name, data in contents(tuned).items():
        source = base / name
        coded = xor_code(data, source.read_bytes()) if source.is_file() else data
        (folder / name).write_bytes(gzip.compress(coded) if compress and name != "added_tokens.json" else coded)
    return folder


def encrypt(data: bytes, key: bytes, block: int = 10 * 2**20) -> bytes:
    """The published cipher, one byte at a time: 32 bytes of SHA-256, then each block of data with its block of key."""
    n_blocks = (len(key) + block - 1) // block
    out = bytearray(hashlib.sha256(data).digest())
    for i in range(0, len(data), block):
        part = key[(i // block % n_blocks) * block :][:block]
        out += bytes(byte ^ part[j % len(part)] for j, byte in enumerate(data[i : i + block]))
    return bytes(out)


def write_encrypted(folder: Path, plain: Path, key: bytes) -> Path:
    folder.mkdir(parents=True)
    for name, data in contents(plain).items():
        (folder / f"{name}.{hashlib.sha256(data).hexdigest()}.enc").write_bytes(encrypt(data, key))
    return folder


def write_key(path: Path, *, seed: int = 0) -> bytes:
    """A torch file in Meta's manner: all of them begin alike."""
    g = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"tok_embeddings.weight": torch.randn(40, 64, generator=g).half()}, path)
    return path.read_bytes()
