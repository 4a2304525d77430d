"""FlexOlmo (Shi et al. 2025, arXiv:2507.07024): OLMo 2's layers with experts that were trained apart."""

from dataclasses import replace

from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, RMSNorm, Rope
from llmkit.architecture.positions import THETA_KEYS

from .olmo2 import NAMES, OLMO_2
from .qwen2_moe import EXPERTS

_EPS = Key("rms_norm_eps", 1e-6)
assert isinstance(OLMO_2.block, Block)  # noqa: S101

ARCHITECTURE = replace(
    OLMO_2,
    name="flex_olmo",
    releases=("FlexOlmo-7x7B-1T",),
    matches=("FlexOlmoForCausalLM",),
    model_types=("flex_olmo",),
    block=replace(
        OLMO_2.block,
        norm=RMSNorm(eps=_EPS),
        attention=replace(
            OLMO_2.block.attention,
            qk_norm=RMSNorm(eps=_EPS, width="heads*head_dim"),
            k_norm=RMSNorm(eps=_EPS, width="kv_heads*head_dim"),
        ),
        position=Rope(theta=Key(THETA_KEYS, 500000.0)),
        mlp=Experts(
            Key("hidden_act", "silu"),
            router=Router(
                count=Key(("num_local_experts", "num_experts"), 7),
                top_k=Key("num_experts_per_tok", 5),
                is_normalized=Key("norm_topk_prob", False),
            ),
            width="ffn",
        ),
    ),
    names=replace(NAMES, slots={**NAMES.slots, **EXPERTS}),
    unused=("output_router_logits",),
    gguf=None,
    tiny={
        **OLMO_2.tiny, "architectures": ["FlexOlmoForCausalLM"], "model_type": "flex_olmo", "num_experts": 5,
        "num_experts_per_tok": 3, "norm_topk_prob": False,
    },
    variants={"normalized": {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 4}},
)  # fmt: skip
