"""GPTBigCode (BigCode 2023): SantaCoder, StarCoder and what was tuned from them (StarChat, WizardCoder-15B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
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
from llmkit.architecture.names import Fused

from .gpt2 import ARCHITECTURE as GPT2
from .gpt2 import GGUF_KEYS as GPT2_KEYS

# Where a config has both names, transformers takes the common one.
_HIDDEN = Key(("hidden_size", "n_embd"))
_MULTI_QUERY = Key("multi_query", True)


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"multi_query": metadata.get("attention.head_count_kv", 1) == 1}


ARCHITECTURE = Architecture(
    name="gpt_bigcode",
    releases=("SantaCoder", "StarCoder", "StarChat"),
    matches=("GPTBigCodeForCausalLM", "GPTBigCodeLMHeadModel", "GPTBigCodeModel"),
    model_types=("gpt_bigcode",),
    dims=Dims(
        hidden=_HIDDEN,
        layers=Key(("num_hidden_layers", "n_layer")),
        heads=Key(("num_attention_heads", "n_head")),
        kv_heads=Computed(lambda config: 1 if lookup(_MULTI_QUERY, config) else None),
        head_dim=DERIVED,
        ffn=Computed(lambda config: config.get("n_inner") or 4 * lookup(_HIDDEN, config)),
        vocab="vocab_size",
        context=Key(("max_position_embeddings", "n_positions")),
    ),
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
        slots={
            "attn_norm": "ln_1",
            "attn.qkv": Fused("attn.c_attn", ("q", "k", "v"), rows="per_group"),
            "attn.o": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
    ),
    gguf=GgufFamily(
        "starcoder",
        slots={"attn.qkv": QKV},
        keys=GPT2_KEYS,
        read=_from_gguf,
        config={"activation_function": "gelu_pytorch_tanh"},
        noted=("activation_function",),
    ),
    tiny={
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": None,
        "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "bos_token_id": 95,
        "eos_token_id": 95,
    },
    variants={
        "multi-head": {"multi_query": False, "n_inner": 48},
        "unscaled": {"scale_attn_weights": False, "tie_word_embeddings": False},
    },
)
