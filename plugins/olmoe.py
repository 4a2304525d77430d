"""OLMoE 1B-7B: eight of 64 small experts for each token, and norms over all heads of queries and of keys."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily, needs_all_heads
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GroupedQuery, RMSNorm, Rope

from .llama import DIMS, TINY
from .qwen2_moe import EXPERTS
from .qwen3 import ARCHITECTURE as QWEN3

_EPS = Key("rms_norm_eps", 1e-5)
_BIAS = Key("attention_bias", False)

ARCHITECTURE = Architecture(
    name="olmoe",
    releases=("OLMoE-1B-7B",),
    matches=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    dims=DIMS,
    block=Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            clip=Key("clip_qkv", None),
            qk_norm=RMSNorm(eps=_EPS, width="heads*head_dim"),
            k_norm=RMSNorm(eps=_EPS, width="kv_heads*head_dim"),
            norms_all_heads=True,
        ),
        position=Rope(),
        mlp=Experts(
            Key("hidden_act", "silu"),
            router=Router(
                count=Key(("num_local_experts", "num_experts"), 64),
                top_k=Key("num_experts_per_tok", 8),
                is_normalized=Key("norm_topk_prob", False),
            ),
            width="ffn",
        ),
    ),
    names=replace(QWEN3.names, slots={**QWEN3.names.slots, **EXPERTS}),
    gguf=GgufFamily(
        "olmoe", config={"norm_topk_prob": False, "hidden_act": "silu"}, refuses=needs_all_heads, has_own_head=True
    ),
    unused=("output_router_logits",),
    tiny={
        **TINY,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
    variants={
        "clipped": {"clip_qkv": 0.5, "num_key_value_heads": 2},
        "normalized": {"norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    },
)
