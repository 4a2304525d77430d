"""gpt-oss 20B and 120B: attention sinks, windows in every other layer, experts with a clamped SwiGLU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import ClampedSwiGLU, Experts, Router
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GroupedQuery, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.names import Stacked
from llmkit.architecture.positions import THETA_KEYS

from .llama import DIMS, NAMES, TINY

# The positions of a config that states none.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_BIAS = Key("attention_bias", True)


def _block(config: Mapping[str, Any], i: int) -> Block:
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            window=window_of(config, 128) if is_sliding(config, i, lambda i: i % 2 == 0) else None,
            sinks=True,
        ),
        position=Rope(theta=Key(THETA_KEYS, 150000.0), scaling=Key(("rope_scaling", "rope_parameters"), _YARN)),
        mlp=Experts(
            ClampedSwiGLU(alpha=Key("swiglu_alpha", 1.702), limit=Key("swiglu_limit", 7.0)),
            bias=True,
            router=Router(
                count=Key(("num_local_experts", "num_experts"), 128),
                top_k=Key(("num_experts_per_tok", "experts_per_token"), 4),
                scores="chosen_softmax",
                bias=True,
            ),
            width="ffn",
        ),
    )


def _scaling(metadata: Metadata) -> dict[str, Any]:
    """Positions, of which a config that states none has others; YaRN as the family's code has it, without rounding."""
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_scaling": {"rope_type": "default"}}
    if kind != "yarn":
        return {}
    names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    names |= {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    values = {name: metadata.get(f"rope.scaling.{key}") for key, name in names.items()}
    stated = {name: round(value, 6) for name, value in values.items() if value is not None}
    return {"rope_scaling": {**_YARN, **stated, "truncate": False}}


ARCHITECTURE = Architecture(
    name="gpt_oss",
    releases=("gpt-oss-20b", "gpt-oss-120b"),
    matches=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    dims=replace(DIMS, head_dim=Key("head_dim", 64)),
    block=PerLayer(_block),
    names=replace(
        NAMES,
        slots={
            **NAMES.without("mlp"),
            "attn.sinks": "self_attn.sinks",
            "mlp.router": "mlp.router",
            "mlp.experts.gate_up": Stacked(
                "mlp.experts.gate_up_proj", ("gate", "up"), "interleaved", is_transposed=True
            ),
            "mlp.experts.down": Stacked("mlp.experts.down_proj", ("down",), is_transposed=True),
        },
    ),
    gguf=GgufFamily(
        "gpt-oss",
        slots={"mlp_norm": "post_attention_norm", "attn.sinks": "attn_sinks.weight"},
        keys={"expert_count": "num_local_experts", "expert_feed_forward_length": ""},
        read=_scaling,
        has_own_head=True,
        has_windows=True,
    ),
    unused=("hidden_act", "initial_context_length", "router_aux_loss_coef", "output_router_logits"),
    optimum_reads={"gpt_oss": ("head_dim", "kv_heads")},
    tiny={
        **TINY,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {**_YARN, "original_max_position_embeddings": 16},
        "sliding_window": 7,
        "eos_token_id": 2,
    },
    variants={
        "defaults": {"rope_theta": None, "rope_scaling": None, "num_key_value_heads": 4},
        "no-biases": {"attention_bias": False, "tie_word_embeddings": True},
        "transformers-5": {
            "rope_theta": None,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
)
