"""MiniMax M2: norms over all heads of queries and keys, experts chosen by sigmoids with a correction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key, as_float, lookup
from llmkit.architecture.kinds import Block, GroupedQuery, RMSNorm, Rope, rotated_share
from llmkit.architecture.positions import THETA_KEYS

from .llama import DIMS, QK_NORMS, TINY
from .mixtral import ARCHITECTURE as MIXTRAL

_EPS = Key("rms_norm_eps", 1e-6)
_THETA = Key(THETA_KEYS, 5000000.0)
_HEAD_DIM = Key("head_dim", 128)


def _share(config: Mapping[str, Any]) -> float:
    """The rotated part of a head; the releases state its dims."""
    dims, head_dim = (lookup(key, config) for key in (Key("rotary_dim", None), _HEAD_DIM))
    share = 1.0 if dims is None else as_float(dims, "rotary_dim") / head_dim
    return as_float(lookup(rotated_share(share), config), "partial_rotary_factor")


ARCHITECTURE = Architecture(
    name="minimax_m2",
    releases=("MiniMax-M2", "MiniMax-M2.1"),
    matches=("MiniMaxM2ForCausalLM",),
    model_types=("minimax_m2",),
    dims=replace(DIMS, head_dim=_HEAD_DIM),
    block=Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qk_norm=RMSNorm(eps=_EPS, width="heads*head_dim"),
            k_norm=RMSNorm(eps=_EPS, width="kv_heads*head_dim"),
            norms_all_heads=True,
        ),
        position=Rope(theta=_THETA, share=Computed(_share)),
        mlp=Experts(
            Key("hidden_act", "silu"),
            router=Router(
                count=Key(("num_local_experts", "num_experts"), 256),
                top_k=Key("num_experts_per_tok", 8),
                scores="sigmoid",
                is_normalized=True,
                correction=True,
            ),
            width="ffn",
        ),
    ),
    names=replace(
        MIXTRAL.names,
        slots={
            **MIXTRAL.names.slots,
            **QK_NORMS,
            "mlp.router.correction": "block_sparse_moe.e_score_correction_bias",
        },
    ),
    gguf=GgufFamily(
        "minimax-m2",
        keys={
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "",
            "rope.dimension_count": "rotary_dim",
        },
        config={"hidden_act": "silu"},
        write=lambda *_: {"expert_gating_func": 2},  # sigmoid
        has_own_head=True,
    ),
    unused=(
        "router_jitter_noise",
        "output_router_logits",
        "router_aux_loss_coef",
        "use_routing_bias",
        "use_mtp",
        "mtp_*",
        "num_mtp_modules",
        "attn_type_list",
    ),
    fixed={"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "shared_intermediate_size": 0},
    tiny={
        **TINY,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "eos_token_id": 2,
    },
    variants={"defaults": {"rotary_dim": None, "rope_theta": None, "tie_word_embeddings": True}},
)
