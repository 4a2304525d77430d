"""ERNIE 4.5 (dense): Llama's layers with rotary pairs side by side and one switch for all biases."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, RMSNorm, Rope
from llmkit.architecture.positions import THETA_KEYS

from .llama import DIMS as LLAMA_DIMS
from .llama import NAMES, TINY

_BIAS = Key("use_bias", False)
DIMS = replace(LLAMA_DIMS, head_dim=Key("head_dim", 128), kv_heads=Key("num_key_value_heads", 2))

ARCHITECTURE = Architecture(
    name="ernie4_5",
    releases=("ERNIE-4.5-0.3B",),
    matches=("Ernie4_5ForCausalLM",),
    model_types=("ernie4_5",),
    dims=DIMS,
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS),
        position=Rope(theta=Key(THETA_KEYS, 500000.0), pairs="interleaved"),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=_BIAS),
    ),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=NAMES,
    gguf=GgufFamily("ernie4_5", pairs="interleaved", config={"hidden_act": "silu"}),
    tiny={
        **TINY,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    variants={"biases": {"use_bias": True, "head_dim": 8, "rope_theta": None, "tie_word_embeddings": False}},
)
