"""Small random models of the LLaMA family, and what the layouts' own programs would do with them, in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def config(heads=4, kv=2, head_dim=8, layers=2, ffn=48, vocab=50, **more):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": heads * head_dim,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float32", **more,
    }  # fmt: skip


def state_of(cfg, dtype=torch.float32, seed=0):
    """transformers' names and row orders, random."""
    g = torch.Generator().manual_seed(seed)
    h, f, v = cfg["hidden_size"], cfg["intermediate_size"], cfg["vocab_size"]
    kv = cfg["num_key_value_heads"] * h // cfg["num_attention_heads"]

    def rand(*shape):
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)

    state = {"model.embed_tokens.weight": rand(v, h)}
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", h, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, h), ("mlp.gate_proj", f, h), ("mlp.up_proj", f, h), ("mlp.down_proj", h, f),
        ):  # fmt: skip
            state[f"{p}{name}.weight"] = rand(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{p}{name}.weight"] = 1 + rand(h)
    state["model.norm.weight"] = 1 + rand(h)
    if not cfg["tie_word_embeddings"]:
        state["lm_head.weight"] = rand(v, h)
    return state


def write_hf(folder: Path, cfg, state) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def interleaved(weight, n_heads):
    """Rows of half-split rotary pairs -> interleaved, as transformers' conversion undone: view(n, 2, D/2, in)."""
    d = weight.shape[0] // n_heads
    return weight.view(n_heads, 2, d // 2, -1).transpose(1, 2).reshape(weight.shape)


def of_layer(state, cfg, i):
    """The nine tensors of a layer by Meta's names, q and k interleaved."""
    p = f"model.layers.{i}."
    return {
        "attention.wq": interleaved(state[f"{p}self_attn.q_proj.weight"], cfg["num_attention_heads"]),
        "attention.wk": interleaved(state[f"{p}self_attn.k_proj.weight"], cfg["num_key_value_heads"]),
        "attention.wv": state[f"{p}self_attn.v_proj.weight"],
        "attention.wo": state[f"{p}self_attn.o_proj.weight"],
        "feed_forward.w1": state[f"{p}mlp.gate_proj.weight"],
        "feed_forward.w2": state[f"{p}mlp.down_proj.weight"],
        "feed_forward.w3": state[f"{p}mlp.up_proj.weight"],
        "attention_norm": state[f"{p}input_layernorm.weight"],
        "ffn_norm": state[f"{p}post_attention_layernorm.weight"],
    }


def meta_state(state, cfg):
    """The whole model by Meta's names."""
    found = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    found["output.weight"] = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    for i in range(cfg["num_hidden_layers"]):
        found |= {f"layers.{i}.{k}.weight": v for k, v in of_layer(state, cfg, i).items()}
    return found


def meta_logits(state, cfg, ids):
    """The published computation: complex rotations of neighbouring pairs, one sequence, no cache. float32."""
    s = {k: v.float() for k, v in meta_state(state, cfg).items()}
    n, nkv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    d = cfg["hidden_size"] // n
    freqs = 1.0 / cfg["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
    turn = torch.polar(torch.ones(len(ids), d // 2), torch.outer(torch.arange(len(ids)).float(), freqs))[:, None]

    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + cfg["rms_norm_eps"]) * w

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    x = s["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for i in range(cfg["num_hidden_layers"]):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in s.items() if k.startswith(f"layers.{i}.")}
        y = norm(x, w["attention_norm.weight"])
        q = rotated((y @ w["attention.wq.weight"].T).view(len(ids), n, d))
        k = rotated((y @ w["attention.wk.weight"].T).view(len(ids), nkv, d)).repeat_interleave(n // nkv, 1)
        v = (y @ w["attention.wv.weight"].T).view(len(ids), nkv, d).repeat_interleave(n // nkv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5 + mask
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, s["norm.weight"]) @ s["output.weight"].T


def same(ckpt, state):
    """Whether a checkpoint has exactly these tensors, bit for bit."""
    assert sorted(ckpt.tensors) == sorted(state)
    for name, want in state.items():
        found = ckpt.tensors[name].load()
        assert found.dtype == want.dtype, name
        assert found.shape == want.shape, name
        assert torch.equal(found, want), name
