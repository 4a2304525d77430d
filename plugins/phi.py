"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side behind one LayerNorm, rotary positions on part of a head."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily, rotary_share
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import (
    Block,
    GroupedQuery,
    Head,
    LayerNorm,
    PlainMLP,
    Rope,
    SharedParallel,
    rotated_share,
)

from .llama import DIMS, NAMES, TINY

_NORM = LayerNorm(eps=Key("layer_norm_eps", 1e-5))

ARCHITECTURE = Architecture(
    name="phi",
    releases=("Phi-1", "Phi-1.5", "Phi-2"),
    matches=("PhiForCausalLM",),
    model_types=("phi",),
    dims=DIMS,
    block=Block(
        norm=_NORM,
        attention=GroupedQuery(
            qkv_bias=True,
            out_bias=True,
            qk_norm=Computed(lambda config: replace(_NORM, width="head_dim") if config.get("qk_layernorm") else None),
        ),
        position=Rope(share=rotated_share(0.5)),
        mlp=PlainMLP(Key("hidden_act", "gelu_new")),
        residual=SharedParallel(),
    ),
    head=Head(tied=Key("tie_word_embeddings", False), bias=True),
    names=replace(
        NAMES,
        final_norm="model.final_layernorm",
        slots={
            "attn_norm": "input_layernorm",
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.dense",
            "attn.q_norm": "self_attn.q_layernorm",
            "attn.k_norm": "self_attn.k_layernorm",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
        },
    ),
    gguf=GgufFamily(
        "phi2",
        config={"hidden_act": "gelu_new"},
        has_own_head=True,
        read=lambda metadata: {"partial_rotary_factor": rotary_share(metadata)},
    ),
    tiny={
        **TINY,
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
    },
    variants={
        "phi-2": {"partial_rotary_factor": 0.4, "hidden_size": 80},
        "grouped": {"num_key_value_heads": 2, "qk_layernorm": True, "partial_rotary_factor": None},
    },
)
