"""RWKV-7's .pth files: the names and shapes of BlinkDL/RWKV-LM as those that transformers' users know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose, view_as

MARKS = ("emb.weight", "blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.ffn.key.weight")
_NAMES = (
    (r"emb\.", "model.embeddings."),
    (r"head\.", "lm_head."),
    (r"ln_out\.", "model.norm."),
    (r"blocks\.(\d+)\.ln0\.", r"model.layers.\1.pre_norm."),
    (r"blocks\.(\d+)\.ln1\.", r"model.layers.\1.attn_norm."),
    (r"blocks\.(\d+)\.ln2\.", r"model.layers.\1.ffn_norm."),
    (r"blocks\.(\d+)\.att\.ln_x\.", r"model.layers.\1.attn.g_norm."),
    (r"blocks\.(\d+)\.att\.receptance\.", r"model.layers.\1.attn.r_proj."),
    (r"blocks\.(\d+)\.att\.key\.", r"model.layers.\1.attn.k_proj."),
    (r"blocks\.(\d+)\.att\.value\.", r"model.layers.\1.attn.v_proj."),
    (r"blocks\.(\d+)\.att\.output\.", r"model.layers.\1.attn.o_proj."),
    (r"blocks\.(\d+)\.att\.([wavg])0$", r"model.layers.\1.attn.\2_lora.lora.2.bias"),
    (r"blocks\.(\d+)\.att\.([wavg])1$", r"model.layers.\1.attn.\2_lora.lora.0.weight"),
    (r"blocks\.(\d+)\.att\.([wavg])2$", r"model.layers.\1.attn.\2_lora.lora.2.weight"),
    (r"blocks\.(\d+)\.att\.", r"model.layers.\1.attn."),
    (r"blocks\.(\d+)\.ffn\.", r"model.layers.\1.ffn."),
)
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]")  # the first layer's values are mixed with none


def opened(tensors: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """The tensors in the family's names, and the config that follows from their shapes."""
    found = {}
    for name, lazy in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        new = next((re.sub(f"^{old}", to, name) for old, to in _NAMES if re.match(old, name)), name)
        if re.search(r"_lora\.lora\.\d\.weight$", new):
            lazy = transpose(lazy)
        elif re.search(r"\.(bias|k_k|k_a)$|ffn\.x_k$", new) and len(lazy.shape) == 3:
            lazy = view_as(lazy, lazy.dtype, lazy.shape[2:])
        found[new] = lazy
    return found, _config({name: lazy.shape for name, lazy in tensors.items()})


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocab, hidden = shapes["emb.weight"]
    ranks = {
        key: shapes.get(f"blocks.{layer}.att.{name}1", (hidden, 1))[1]
        for name, layer, key in (
            ("w", 0, "decay_low_rank_dim"),
            ("a", 0, "a_low_rank_dim"),
            ("v", 1, "v_low_rank_dim"),
            ("g", 0, "gate_low_rank_dim"),
        )
    }
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "head_dim": shapes["blocks.0.att.r_k"][1],
        "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
        "num_hidden_layers": 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        **ranks,
        "norm_eps": 1e-5,
        "hidden_act": "sqrelu",
        "tie_word_embeddings": False,
    }
