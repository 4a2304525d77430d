"""OLMo 1 (Groeneveld et al. 2024, arXiv:2402.00838): Llama's layers with norms that have no weights."""

from __future__ import annotations

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, LayerNorm, Rope

from .llama import DIMS, GGUF, NAMES, TINY

_BIAS = Key("attention_bias", False)

ARCHITECTURE = Architecture(
    name="olmo",
    releases=("OLMo-1B", "OLMo-7B", "OLMo-7B-0724"),
    matches=("OlmoForCausalLM",),
    model_types=("olmo",),
    dims=DIMS,
    block=Block(
        norm=LayerNorm(eps=1e-5, affine=False),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, clip=Key("clip_qkv", None)),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
    ),
    names=NAMES,
    gguf=GgufFamily(
        "olmo",
        pairs=GGUF.pairs,
        keys={"attention.clamp_kqv": "clip_qkv", "attention.layer_norm_epsilon": ""},
        config={"hidden_act": "silu"},
        write=lambda _, config: {"attention.clamp_kqv": config.get("clip_qkv")},
    ),
    tiny={**TINY, "clip_qkv": 0.5, "pad_token_id": 1, "num_key_value_heads": 4},
    variants={"1b": {"clip_qkv": None, "tie_word_embeddings": True}, "grouped": {"num_key_value_heads": 2}},
)
