"""Starcoder2 (Lozhkov et al. 2024, arXiv:2402.19173): LayerNorm, an MLP without gate, biases everywhere, a window."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GroupedQuery, Head, LayerNorm, PlainMLP, Rope
from llmkit.architecture.layer_types import window_of

from .llama import DIMS, NAMES, TINY

_BIAS = Key("use_bias", True)
_MLP = {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}

ARCHITECTURE = Architecture(
    name="starcoder2",
    releases=("StarCoder2-3B", "StarCoder2-7B", "StarCoder2-15B"),
    matches=("Starcoder2ForCausalLM",),
    model_types=("starcoder2",),
    dims=replace(DIMS, kv_heads=Key("num_key_value_heads", 2)),
    block=Block(
        norm=LayerNorm(eps=Key("norm_epsilon", 1e-5)),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            window=Computed(lambda config: window_of(config, None)),
        ),
        position=Rope(),
        mlp=PlainMLP(Key("hidden_act", "gelu_pytorch_tanh"), bias=_BIAS),
    ),
    unused=("norm_type", "mlp_type", "residual_dropout", "embedding_dropout"),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=replace(NAMES, slots=NAMES.without("mlp") | _MLP),
    gguf=GgufFamily(
        "starcoder2",
        keys={"attention.layer_norm_epsilon": "norm_epsilon"},
        config={"hidden_act": "gelu_pytorch_tanh"},
        refuses=lambda model: None if "layers.0.attn.o.bias" in model.slots else "its layers have no biases",
    ),
    tiny={
        **TINY,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "sliding_window": 7,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    variants={
        "no-bias": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
        "defaults": {"use_bias": None, "norm_epsilon": None, "hidden_act": None, "tie_word_embeddings": None},
    },
)
