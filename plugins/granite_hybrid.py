"""Granite 4: Mamba 2 in most layers, attention in a few, Granite's multipliers; with experts, or a shared MLP alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, NoPositions, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import layer_type
from llmkit.architecture.mamba import StateSpaceDuality, step_limit
from llmkit.architecture.names import Fused

from . import hybrid_gguf
from .bamba import sizes
from .granite import ARCHITECTURE as GRANITE
from .granite import BLOCK
from .granite_moe import EXPERTS, GRANITE_MOE_SHARED
from .llama import DIMS, NAMES
from .mamba2 import MIXER

# Of published files, and as transformers 5 writes them.
_SORTS = ("mamba", "attention", "linear_attention", "full_attention")
_ACT, _MIXER_BIAS = Key("hidden_act", "silu"), Key("mamba_proj_bias", False)
_SHARED_WIDTH = Key("shared_intermediate_size", 1024)
_MIXER = StateSpaceDuality(
    _ACT,
    conv_bias=Key("mamba_conv_bias", True),
    in_bias=_MIXER_BIAS,
    out_bias=_MIXER_BIAS,
    norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
    limit=Computed(step_limit),
)


def _layers(mlp: GatedMLP) -> PerLayer:
    def block(config: Mapping[str, Any], i: int) -> Block:
        is_recurrent = layer_type(config, i, _SORTS, lambda _: "mamba") in ("mamba", "linear_attention")
        is_turned = not is_recurrent and config.get("position_embedding_type") == "rope"
        return replace(
            BLOCK,
            attention=_MIXER if is_recurrent else BLOCK.attention,
            position=Rope() if is_turned else NoPositions(),
            mlp=mlp,
        )

    return PerLayer(block)


_SIZES = sizes(Computed(lambda config: config.get("mamba_expand", 2) * config["hidden_size"]))
_SLOTS = {f"attn.{slot}": f"mamba.{name}" for slot, name in MIXER.items()}
_TINY = {
    **{key: value for key, value in GRANITE.tiny.items() if key not in ("architectures", "model_type")},
    "layer_types": ["mamba", "attention"], "position_embedding_type": "nope", "shared_intermediate_size": 24,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
_ROPE = {"position_embedding_type": "rope", "layer_types": ["attention", "mamba"], "mamba_conv_bias": False}

GRANITE_MOE_HYBRID = replace(
    GRANITE_MOE_SHARED,
    name="granitemoehybrid",
    releases=("Granite 4.0 H Tiny, Small",),
    matches=("GraniteMoeHybridForCausalLM",),
    model_types=("granitemoehybrid",),
    when=lambda config: bool(config.get("num_local_experts", 8)),
    dims=replace(DIMS, extra={"shared_ffn": _SHARED_WIDTH, **_SIZES}),
    block=_layers(replace(EXPERTS, shared="shared_ffn")),
    names=replace(GRANITE_MOE_SHARED.names, slots={**GRANITE_MOE_SHARED.names.slots, **_SLOTS}),
    gguf=hybrid_gguf.GRANITE_MOE,
    fixed={},
    unused=(
        *(*GRANITE_MOE_SHARED.unused, "mamba_*", "rope_*", "init_method", "normalization_function", "time_step_*"),
        *("attention_multiplier", "position_embedding_type"),  # of a model without attention
    ),
    tiny={**_TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    variants={"rope": _ROPE},
)
GRANITE_HYBRID = replace(
    GRANITE_MOE_HYBRID,
    name="granitehybrid",
    releases=("Granite 4.0 Micro, 1B, 350M", "Granite 4.0 H Micro, 1B, 350M"),
    when=lambda config: not config.get("num_local_experts", 8),
    dims=replace(DIMS, ffn=_SHARED_WIDTH, extra=_SIZES),
    block=_layers(GatedMLP(_ACT)),
    names=replace(
        NAMES,
        slots={
            **NAMES.without("mlp"),
            **_SLOTS,
            "mlp.gate_up": Fused("shared_mlp.input_linear", ("gate", "up")),
            "mlp.down": "shared_mlp.output_linear",
        },
    ),
    gguf=hybrid_gguf.GRANITE,
    unused=(*GRANITE_MOE_HYBRID.unused, "num_experts_per_tok", "intermediate_size"),
    tiny={**_TINY, "num_local_experts": 0, "num_experts_per_tok": 0},
    variants={"rope": _ROPE, "attention": {**_ROPE, "layer_types": ["attention", "attention"]}},
)
