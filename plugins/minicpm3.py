"""MiniCPM3: latent attention in dense layers, with a multiplier on embeddings, branches and logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key, as_float
from llmkit.architecture.kinds import Block, Embedding, GatedMLP, Head, RMSNorm, Rope
from llmkit.architecture.latent import LatentAttention

from . import latent

# As the class has them; llama.cpp computes with these whatever a file says.
_SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
_V_WIDTH = Computed(lambda c: c.get("v_head_dim") or c["hidden_size"] // c["num_attention_heads"])


def _scale(config: Mapping[str, Any], name: str) -> float | None:
    """A multiplier of the config; None where it is null, which is none."""
    value = config.get(name, _SCALES[name])
    return None if value is None else as_float(value, name)


def _branch(config: Mapping[str, Any]) -> float | None:
    depth = _scale(config, "scale_depth")
    return None if depth is None else depth / math.sqrt(as_float(config["num_hidden_layers"], "num_hidden_layers"))


def _logits(config: Mapping[str, Any]) -> float | None:
    base = _scale(config, "dim_model_base")
    return None if base is None else base / as_float(config["hidden_size"], "hidden_size")


ARCHITECTURE = Architecture(
    name="minicpm3",
    releases=("MiniCPM3-4B",),
    matches=("MiniCPM3ForCausalLM",),
    model_types=("minicpm3",),
    dims=latent.dims({}, nope=64, rope=32, kv_rank=256, q_rank=768, v_width=_V_WIDTH),
    embedding=Embedding(scale=Computed(lambda config: _scale(config, "scale_emb"))),
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=LatentAttention(bias=Key("attention_bias", False)),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
        multiplier=Computed(_branch),
    ),
    head=Head(tied=Key("tie_word_embeddings", True), scale=Computed(_logits)),
    names=latent.NAMES,
    fixed=latent.ONE_KEY_EACH,
    unused=latent.FOLLOWING,
    gguf=replace(
        latent.GGUF,
        arch="minicpm3",
        config={**latent.GGUF.config, **_SCALES},
        refuses=lambda model: None if model.dims.extra["q_rank"] else "it compresses no queries",
    ),
    tiny={**latent.TINY, **_SCALES, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    variants={
        "plain-queries": {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        "other-scales": {"scale_emb": 1, "scale_depth": 2.0, "dim_model_base": 16, "v_head_dim": None},
        "longrope": {
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0],
                "original_max_position_embeddings": 16,
            },
        },
    },
)  # fmt: skip
