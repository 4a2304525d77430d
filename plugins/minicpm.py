"""MiniCPM 1 and 2 (OpenBMB 2024, arXiv:2404.06395): Llama's layers with multipliers that keep widths and depths alike.

Source: modeling_minicpm.py (OpenBMB/MiniCPM), whose outputs are recorded in tests/golden. transformers' Granite is the
same model (`equivalents`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.keys import Computed, Key, as_float, lookup, respelled
from llmkit.architecture.kinds import Block, Embedding, GatedMLP, GroupedQuery, Head, RMSNorm, Rope
from llmkit.architecture.model import Model

from .llama import GGUF, TINY
from .llama_alikes import alike, as_llama

_BIAS = Key("attention_bias", False)


def _number(name: str, config: Mapping[str, Any]) -> float:
    return as_float(lookup(Key(name, 1), config), name)


def _branches(config: Mapping[str, Any]) -> float:
    return _number("scale_depth", config) / math.sqrt(_number("num_hidden_layers", config))


def _width(config: Mapping[str, Any]) -> float:
    """How much wider the model is than the one that it was scaled from."""
    return _number("hidden_size", config) / _number("dim_model_base", config)


def _score_scale(config: Mapping[str, Any]) -> float:
    return float((config["hidden_size"] // config["num_attention_heads"]) ** -0.5)


def _as_granite(config: Mapping[str, Any]) -> dict[str, Any]:
    return respelled(
        as_llama(config),
        "GraniteForCausalLM",
        "granite",
        dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base"), ""),
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        attention_multiplier=_score_scale(config),
        embedding_multiplier=_number("scale_emb", config),
        residual_multiplier=_branches(config),
        logits_scaling=_width(config),
    )


def _metadata(model: Model, config: Mapping[str, Any]) -> dict[str, float]:
    scale = _number("scale_emb", config)
    return {"embedding_scale": scale, "residual_scale": _branches(config), "logit_scale": _width(config)}


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Files of before the keys are those of MiniCPM-2B, as llama.cpp takes them."""
    hidden, layers = metadata["embedding_length"], metadata["block_count"]
    return {
        "scale_emb": metadata.get("embedding_scale", 12.0),
        "scale_depth": metadata.get("residual_scale", 1.4 / math.sqrt(layers)) * math.sqrt(layers),
        "dim_model_base": round(hidden / metadata.get("logit_scale", hidden / 256)),
    }


ARCHITECTURE = alike(
    "minicpm",
    ("MiniCPM-1B", "MiniCPM-2B"),
    ("MiniCPMForCausalLM",),
    "minicpm",
    _as_granite,
    equivalents={"granite": _as_granite},
    embedding=Embedding(scale=Key("scale_emb", 1)),
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, scale=Computed(_score_scale)),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
        multiplier=Computed(_branches),
    ),
    head=Head(tied=Key("tie_word_embeddings", True), scale=Computed(lambda config: 1 / _width(config))),
    gguf=replace(GGUF, arch="minicpm", flags={"attention_bias": "blk.0.attn_q.bias"}, read=_from_gguf, write=_metadata),
    tiny={
        **TINY,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-5,
        "scale_emb": 12,
        "scale_depth": 1.5,
        "dim_model_base": 16,
        "tie_word_embeddings": True,
    },
    variants={"untied": {"tie_word_embeddings": False, "attention_bias": True}},
)
