"""Qwen3.5's text models: three layers in four are Gated DeltaNets, the others have gated attention."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.deltanet import GatedDeltaNet, delta_sizes
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import (
    Block,
    GatedMLP,
    GroupedQuery,
    Kind,
    NoPositions,
    PerLayer,
    RMSNorm,
    Rope,
    rotated_share,
)
from llmkit.architecture.layer_types import layer_type
from llmkit.architecture.names import Fused

from .delta_gguf import GGUF
from .llama import DIMS as LLAMA_DIMS
from .llama import NAMES as LLAMA_NAMES
from .llama import QK_NORMS
from .llama import TINY as LLAMA_TINY

_SORTS = ("linear_attention", "full_attention")
_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-6), offset=1.0)
_ACT = Key("hidden_act", "silu")
_BIAS = Key("attention_bias", False)

DIMS = replace(
    LLAMA_DIMS,
    kv_heads=Key("num_key_value_heads", 4),
    head_dim=Key("head_dim", 256),
    extra={
        **delta_sizes(
            heads=Key("linear_num_key_heads", 16),
            width=Key("linear_key_head_dim", 128),
            kernel=Key("linear_conv_kernel_dim", 4),
            value_heads=Key("linear_num_value_heads", 32),
            value_width=Key("linear_value_head_dim", 128),
        ),
    },
)


def mixer(config: Mapping[str, Any], i: int, mlp: Kind) -> Block:
    """Layer `i` with its MLP."""
    interval = config.get("full_attention_interval") or 4
    is_linear = layer_type(config, i, _SORTS, lambda i: _SORTS[(i + 1) % interval == 0]) == _SORTS[0]
    delta = GatedDeltaNet(norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6), width="delta_value_dim"), act=_ACT)
    full = GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=replace(_NORM, width="head_dim"), gate=True)
    return Block(
        norm=_NORM,
        attention=delta if is_linear else full,
        position=NoPositions() if is_linear else Rope(share=rotated_share(0.25)),
        mlp=mlp,
    )


# What the Gated DeltaNets of Qwen3-Next and Qwen3.5 have in common.
NAMES = replace(
    LLAMA_NAMES,
    slots={
        **LLAMA_NAMES.without("attn.q"),
        "attn.q_gate": Fused("self_attn.q_proj", ("q", "gate"), rows="per_group", groups="heads"),
        **QK_NORMS,
        "attn.conv": Fused("linear_attn.conv1d", ("conv_q", "conv_k", "conv_v")),
        "attn.dt_bias": "linear_attn.dt_bias",
        "attn.A_log": "linear_attn.A_log",
        "attn.out_norm": "linear_attn.norm",
        "attn.out": "linear_attn.out_proj",
    },
    ignored=("mtp.*",),
)
# Text has one position in all three grids.
UNUSED = ("mtp_*", "mamba_ssm_dtype", "full_attention_interval", "rope_*.mrope_*")
TINY: dict[str, Any] = {
    **LLAMA_TINY, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.25, "eos_token_id": 2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "linear_value_head_dim": 12, "tie_word_embeddings": True},
    "one-key-head": {
        "linear_value_head_dim": 40,
        "linear_key_head_dim": 40,
        "linear_num_key_heads": 1,
        "linear_conv_kernel_dim": 3,
        "layer_types": ["full_attention", "linear_attention"],
    },
}

ARCHITECTURE = Architecture(
    name="qwen3_5",
    releases=("Qwen3.5 (dense)",),
    matches=("Qwen3_5ForCausalLM", "Qwen3_5TextModel"),
    model_types=("qwen3_5_text",),
    dims=DIMS,
    block=PerLayer(lambda config, i: mixer(config, i, GatedMLP(_ACT))),
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            "attn.in_qkv": Fused("linear_attn.in_proj_qkv", ("in_q", "in_k", "in_v")),
            "attn.in_z": "linear_attn.in_proj_z",
            "attn.in_b": "linear_attn.in_proj_b",
            "attn.in_a": "linear_attn.in_proj_a",
        },
    ),
    fixed={"attn_output_gate": True},
    unused=UNUSED,
    gguf=GGUF,
    tiny=TINY,
    variants=VARIANTS,
)
