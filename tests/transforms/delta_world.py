"""Tiny Llama-layout checkpoints for the tests of deltas."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint

State = dict[str, torch.Tensor]


def shapes(rows: int, hidden: int = 64, layers: int = 2, ffn: int = 96) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {f"{p}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        found |= {f"{p}mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        found[f"{p}mlp.down_proj.weight"] = (hidden, ffn)
        found |= {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


def weights(rows: int = 96, seed: int = 0, dtype: torch.dtype = torch.float16, **sizes: int) -> State:
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(rows, **sizes).items():
        x = torch.randn(shape, generator=g) * 0.02
        state[name] = (1 + 5 * x if "norm" in name else x).to(dtype)
    return state


def tuned_of(base: State, seed: int = 1, scale: float = 0.05, dtype: torch.dtype = torch.float16) -> State:
    """Every weight moved by a normal step of `scale` times the size of the weights."""
    g = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in base.items()}
    return {k: (v.double() + scale * 0.02 * noise[k]).to(dtype) for k, v in base.items()}


def config(state: State, **extra: object) -> dict[str, object]:
    layers = 1 + max(int(k.split(".layers.")[1].split(".")[0]) for k in state if ".layers." in k)
    embed = next(v for k, v in state.items() if k.endswith("embed_tokens.weight"))
    found: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": embed.shape[1],
        "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "vocab_size": embed.shape[0], "tie_word_embeddings": False, "torch_dtype": "float16",
    }  # fmt: skip
    return found | extra


def save(folder: Path, state: State, files: dict[str, str] | None = None, **extra: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(state, **extra)))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def checkpoint(folder: Path, state: State, files: dict[str, str] | None = None, **extra: object) -> Checkpoint:
    return open_checkpoint(save(folder, state, files, **extra))


def loaded(ckpt: Checkpoint) -> State:
    return {name: lazy.load() for name, lazy in ckpt.tensors.items()}


def assert_same(found: State, expected: State) -> None:
    """Bit for bit: dtype, shape and every bit, the sign of zero too."""
    assert sorted(found) == sorted(expected)
    for name, want in expected.items():
        got = found[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got, want)]
        assert torch.equal(*as_bytes), f"{name}: {(as_bytes[0] != as_bytes[1]).sum()} bytes differ"
