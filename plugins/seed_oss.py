"""Seed-OSS: Llama's layers with biases on q, k and v, and heads of a size of their own."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope

from .llama import DIMS, NAMES, TINY

ARCHITECTURE = Architecture(
    name="seed_oss",
    releases=("Seed-OSS-36B",),
    matches=("SeedOssForCausalLM",),
    model_types=("seed_oss",),
    dims=replace(DIMS, head_dim=Key("head_dim", 128)),
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=GroupedQuery(qkv_bias=Key("attention_bias", True), out_bias=Key("attention_out_bias", False)),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
    ),
    names=NAMES,
    gguf=GgufFamily(
        "seed_oss",
        slots={"mlp_norm": "post_attention_norm"},
        config={"hidden_act": "silu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
    ),
    tiny={**TINY, "head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-6, "pad_token_id": 1},
    variants={
        "output-bias": {"attention_out_bias": True, "mlp_bias": True},
        "no-bias": {"attention_bias": False, "head_dim": None, "hidden_size": 24, "tie_word_embeddings": True},
    },
)
