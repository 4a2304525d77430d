"""GPTBigCode (BigCode 2023): SantaCoder, StarCoder and what was tuned from them (StarChat, WizardCoder-15B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Block,
    Embedding,
    GroupedQuery,
    Head,
    LayerNorm,
    LearnedPositions,
    NoPositions,
    PlainMLP,
)
from llmkit.architecture.names import Fused, stem_of

from .gpt2 import ARCHITECTURE as GPT2
from .gpt2 import GGUF_KEYS, TINY

_MULTI_QUERY = Key("multi_query", True)


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"multi_query": metadata.get("attention.head_count_kv", 1) == 1}


ARCHITECTURE = Architecture(
    name="gpt_bigcode",
    releases=("SantaCoder", "StarCoder", "StarChat"),
    matches=("GPTBigCodeForCausalLM", "GPTBigCodeLMHeadModel", "GPTBigCodeModel"),
    model_types=("gpt_bigcode",),
    dims=replace(GPT2.dims, kv_heads=Computed(lambda config: 1 if lookup(_MULTI_QUERY, config) else None)),
    embedding=Embedding(positions=LearnedPositions()),
    block=Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
        attention=GroupedQuery(
            qkv_bias=True,
            out_bias=True,
            scale=Computed(lambda config: None if lookup(Key("scale_attn_weights", True), config) else 1.0),
        ),
        position=NoPositions(),
        mlp=PlainMLP(Key("activation_function", "gelu_pytorch_tanh")),
    ),
    # How the softmax is rounded, and switches of the code of early 2023.
    unused=(
        "*attention_softmax_in_fp32",
        "attention_implementation",
        "inference_runner",
        "max_batch_size",
        "num_key_value_heads",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "validate_runner_input",
    ),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=replace(
        GPT2.names,
        slots={slot: stem_of(entry) for slot, entry in GPT2.names.slots.items()}
        | {"attn.qkv": Fused("attn.c_attn", ("q", "k", "v"), rows="per_group")},
    ),
    gguf=GgufFamily(
        "starcoder",
        slots={"attn.qkv": QKV},
        keys=GGUF_KEYS,
        read=_from_gguf,
        config={"activation_function": "gelu_pytorch_tanh"},
        noted=("activation_function",),
    ),
    tiny={**TINY, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    variants={
        "multi-head": {"multi_query": False, "n_inner": 48},
        "unscaled": {"scale_attn_weights": False, "tie_word_embeddings": False},
    },
)
