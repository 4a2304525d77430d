"""Qwen3-Next: Qwen3.5's layers with experts; what a Gated DeltaNet reads lies together for each of its key heads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.keys import Flag, Key
from llmkit.architecture.kinds import Block, PerLayer
from llmkit.architecture.names import Fused

from .delta_gguf import GGUF_NEXT
from .qwen2_moe import ACT, mlp_of
from .qwen2_moe import ARCHITECTURE as QWEN2_MOE
from .qwen3_5 import DIMS, NAMES, TINY, UNUSED, VARIANTS, mixer

MOE_DIMS = replace(
    DIMS,
    extra={
        **DIMS.extra,
        "expert_ffn": Key("moe_intermediate_size", 512),
        "shared_ffn": Key("shared_expert_intermediate_size", 512),
    },
)
MLP = {slot: entry for slot, entry in QWEN2_MOE.names.slots.items() if slot.startswith("mlp.")}
MOE_TINY = {
    **TINY,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}


def experts_of(count: int, top_k: int, is_normalized: Flag) -> Experts:
    """The experts, with the numbers of them that hold where config.json has none."""
    router = Router(
        count=Key(("num_local_experts", "num_experts"), count),
        top_k=Key("num_experts_per_tok", top_k),
        is_normalized=is_normalized,
    )
    return Experts(ACT, router=router, shared="shared_ffn", shared_gate=True)


def _block(config: Mapping[str, Any], i: int) -> Block:
    return mixer(config, i, mlp_of(config, i, experts_of(512, 10, Key("norm_topk_prob", True))))


ARCHITECTURE = Architecture(
    name="qwen3_next",
    releases=("Qwen3-Next-80B-A3B", "Qwen3-Coder-Next"),
    matches=("Qwen3NextForCausalLM",),
    model_types=("qwen3_next",),
    dims=MOE_DIMS,
    block=PerLayer(_block),
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **MLP,
            "attn.in_qkvz": Fused(
                "linear_attn.in_proj_qkvz", ("in_q", "in_k", "in_v", "in_z"), "per_group", "delta_key_heads"
            ),
            "attn.in_ba": Fused("linear_attn.in_proj_ba", ("in_b", "in_a"), "per_group", "delta_key_heads"),
        },
    ),
    unused=(*UNUSED, "output_router_logits"),
    gguf=GGUF_NEXT,
    tiny={**MOE_TINY, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    variants={
        **VARIANTS,
        "dense-below": {"mlp_only_layers": [0], "norm_topk_prob": False},
        "transformers-5": {
            "partial_rotary_factor": None,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
        },
    },
)
