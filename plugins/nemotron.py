"""Nemotron-4 and Minitron (Parmar et al. 2024, arXiv:2402.16819): LayerNorm that stores weight - 1, squared ReLU."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily, rotary_share
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GroupedQuery, LayerNorm, PlainMLP, Rope, rotated_share

from .llama import DIMS, GGUF, NAMES, TINY

_BIAS = Key("attention_bias", False)

ARCHITECTURE = Architecture(
    name="nemotron",
    releases=("Minitron-4B", "Minitron-8B", "Nemotron-4-340B"),
    matches=("NemotronForCausalLM",),
    model_types=("nemotron",),
    dims=DIMS,
    block=Block(
        norm=LayerNorm(eps=Key("norm_eps", 1e-5), offset=1.0),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS),
        position=Rope(share=rotated_share(0.5)),
        mlp=PlainMLP(Key("hidden_act", "relu2"), bias=Key("mlp_bias", False)),
    ),
    names=replace(NAMES, slots=NAMES.without("mlp.gate")),
    gguf=GgufFamily(
        "nemotron",
        norm_offset=1.0,
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        config={"hidden_act": "relu2"},
        flags=GGUF.flags,
        has_own_head=True,
        read=lambda metadata: {"partial_rotary_factor": rotary_share(metadata)},
    ),
    optimum_reads={"nemotron": ("head_dim", "kv_heads")},
    tiny={
        **TINY,
        "hidden_size": 64,
        "norm_eps": 1e-5,
        "hidden_act": "relu2",
        "partial_rotary_factor": 0.5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    variants={
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
        "minitron": {"head_dim": 32, "partial_rotary_factor": None, "num_key_value_heads": 4},
    },
)
