"""Bamba: Mamba 2 in most layers, attention in a few, an MLP in all (IBM, Princeton, CMU, UIUC 2024)."""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, NoPositions, PerLayer, RMSNorm, Rope
from llmkit.architecture.mamba import StateSpaceDuality, duality_sizes, step_limit
from llmkit.architecture.names import Names, linears
from llmkit.architecture.positions import THETA_KEYS

from .hybrid_gguf import BAMBA
from .mamba2 import MIXER

_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-5))
_ACT, _BIAS, _MIXER_BIAS = Key("hidden_act", "silu"), Key("attention_bias", False), Key("mamba_proj_bias", False)

# The names of a layer, but for its mixer's.
SLOTS = {
    "attn_norm": "input_layernorm",
    **linears("attn", "self_attn", "qkvo"),
    "mlp_norm": "pre_ff_layernorm",
    **linears("mlp", "feed_forward"),
}


def sizes(inner: Computed) -> dict[str, Key | Computed]:
    """`Dims.extra`, of a mixer that is `inner` wide."""
    return duality_sizes(
        inner,
        heads=Key("mamba_n_heads", 128),
        groups=Key("mamba_n_groups", 1),
        state=Key("mamba_d_state", 256),
        kernel=Key("mamba_d_conv", 4),
    )


def _block(config: Mapping[str, Any], i: int) -> Block:
    is_attention = i in (config.get("attn_layer_indices") or ())
    mixer = StateSpaceDuality(
        _ACT,
        conv_bias=Key("mamba_conv_bias", True),
        in_bias=_MIXER_BIAS,
        out_bias=_MIXER_BIAS,
        norm=_NORM,
        limit=Computed(step_limit),
    )
    return Block(
        norm=_NORM,
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS) if is_attention else mixer,
        # the class turns half of each head, whatever the config says
        position=Rope(theta=Key(THETA_KEYS, 10000.0), share=0.5) if is_attention else NoPositions(),
        mlp=GatedMLP(_ACT, bias=Key("mlp_bias", False)),
    )


_TINY = {
    "num_key_value_heads": 2, "attn_layer_indices": [1],
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="bamba",
    releases=("Bamba 9B",),
    matches=("BambaForCausalLM",),
    model_types=("bamba",),
    dims=Dims(
        hidden=Key("hidden_size", 4096),
        layers=Key("num_hidden_layers", 32),
        heads=Key("num_attention_heads", 32),
        kv_heads=Computed(lambda config: config.get("num_key_value_heads", 8)),
        ffn=Key("intermediate_size", 14336),
        vocab=Key("vocab_size", 128000),
        extra=sizes(Computed(lambda config: int(config.get("mamba_expand", 2) * config["hidden_size"]))),
    ),
    block=PerLayer(_block),
    unused=(
        *("mamba_*", "rope_*", "num_logits_to_keep", "time_step_*", "layer*_type*", "z_loss*", "attn_*"),
        "partial_rotary_factor",
    ),
    gguf=BAMBA,
    names=Names(
        embed="model.embed_tokens",
        final_norm="model.final_layernorm",
        head="lm_head",
        block="model.layers.{i}.",
        slots={**SLOTS, **{f"attn.{slot}": f"mamba.{name}" for slot, name in MIXER.items()}},
    ),
    tiny=_TINY,
    variants={"tied": {"attn_layer_indices": [0], "mamba_conv_bias": False, "tie_word_embeddings": True}},
)
