"""Gemma 1: Llama's layers with norms that store weight - 1, embeddings times sqrt(hidden), tanh GELU, a tied head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily, needs_tied_head
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, Embedding, GatedMLP, GroupedQuery, Head, RMSNorm, Rope

from .llama import DIMS as LLAMA_DIMS
from .llama import NAMES

DIMS = replace(LLAMA_DIMS, head_dim=Key("head_dim", 256))
NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-6), offset=1.0)
BIAS = Key("attention_bias", False)
TINY = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _scale(config: Mapping[str, Any]) -> float:
    return float(float(config["hidden_size"]) ** 0.5)


EMBEDDING = Embedding(scale=Computed(_scale))


def _activation(config: Mapping[str, Any]) -> str:
    # The first files say `gelu` and mean the approximation by tanh, with which the models were trained.
    stated = config.get("hidden_act") or "gelu"
    return "gelu_pytorch_tanh" if stated == "gelu" else str(stated)


# llama.cpp's norms take the weight itself, and its head is always the embedding.
GGUF = GgufFamily(
    "gemma",
    norm_offset=1.0,
    config={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    refuses=needs_tied_head,
)


def _plainly(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "hidden_act": _activation(config)}


ARCHITECTURE = Architecture(
    name="gemma",
    releases=("Gemma 2B", "Gemma 7B"),
    matches=("GemmaForCausalLM",),
    model_types=("gemma",),
    reference_config=_plainly,  # transformers 4.48 to 4.57 forgot what `gelu` means here
    dims=DIMS,
    embedding=EMBEDDING,
    block=Block(
        norm=NORM,
        attention=GroupedQuery(qkv_bias=BIAS, out_bias=BIAS),
        position=Rope(),
        mlp=GatedMLP(Computed(_activation)),
    ),
    fixed={"use_bidirectional_attention": False},
    unused=("hidden_activation",),  # of releases of transformers between those that read `hidden_act`
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=NAMES,
    gguf=GGUF,
    optimum_reads={"gemma": ("head_dim", "kv_heads")},
    tiny={
        **TINY,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
    },
    variants={
        "2b": {"num_key_value_heads": 1, "head_dim": 8},
        "first-files": {"hidden_act": "gelu", "hidden_activation": None},
        "defaults": {"hidden_act": None, "hidden_activation": None, "head_dim": None, "rms_norm_eps": None},
        "untied": {"tie_word_embeddings": False},
        "attention-bias": {"attention_bias": True},
        "transformers-5": {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        },
    },
)
