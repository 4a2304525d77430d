"""Phi-3, Phi-3.5 mini and medium, Phi-4 and Phi-4-mini: Llama's layers with q, k and v, and gate and up, fused."""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import QKV, GgufFamily, rotary_share
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope, rotated_share
from llmkit.architecture.layer_types import window_of
from llmkit.architecture.names import Fused, Transposed
from llmkit.architecture.scaling import Scaling, scaling_of

from .llama import DIMS, TINY
from .llama import NAMES as LLAMA_NAMES

_SLOTS: dict[str, str | Fused | Transposed] = {
    "attn_norm": "input_layernorm",
    "attn.qkv": Fused("self_attn.qkv_proj", ("q", "k", "v")),
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up": Fused("mlp.gate_up_proj", ("gate", "up")),
    "mlp.down": "mlp.down_proj",
}


def _scaling(config: Mapping[str, Any]) -> Scaling:
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if params.get("rope_type", params.get("type")) in ("su", "yarn"):
        params = ChainMap({"rope_type": "longrope"}, params)  # its names in the first releases
    original = config.get("original_max_position_embeddings") or 4096
    # No copy: it would count every key as read. A ChainMap only reads.
    return scaling_of(params, ChainMap({"original_max_position_embeddings": original}, config))  # type: ignore[arg-type]


_LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
}

ARCHITECTURE = Architecture(
    name="phi3",
    releases=("Phi-3", "Phi-3.5-mini", "Phi-4", "Phi-4-mini"),
    matches=("Phi3ForCausalLM",),
    model_types=("phi3",),
    dims=DIMS,
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(window=Computed(lambda config: window_of(config, None))),
        position=Rope(scaling=Computed(_scaling), share=rotated_share(1.0)),
        mlp=GatedMLP(Key("hidden_act", "silu")),
    ),
    unused=("full_attn_mod", "interpolate_factor", "lm_head_bias"),
    names=replace(LLAMA_NAMES, slots=_SLOTS),
    gguf=GgufFamily(
        "phi3",
        slots={"attn.qkv": QKV, "mlp.gate_up": Fused("ffn_up", ("gate", "up"))},
        keys={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        read=lambda metadata: {"partial_rotary_factor": rotary_share(metadata)},
        write=lambda _, config: {
            "rope.scaling.original_context_length": config.get("original_max_position_embeddings")
        },
    ),
    tiny={
        **TINY,
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "sliding_window": 7,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    variants={
        "medium": {"num_key_value_heads": 2, "sliding_window": None},
        "128k-short": {
            "original_max_position_embeddings": 32,
            "rope_scaling": _LONG,
        },
        # The contract's 24 tokens are beyond the original context here: the long factors.
        "128k-long": {
            "original_max_position_embeddings": 16,
            "sliding_window": 256,
            "rope_scaling": _LONG,
        },
        "phi-4-mini": {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.0, 1.1, 1.6, 4.0, 11.0, 30.0],
            },
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        "transformers-5": {
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 4.0, 8.0, 16.0],
            },
            "original_max_position_embeddings": 16,
        },
    },
)
