"""OLMo 2 and 3: norms after attention and MLP, not before, and over all heads of queries and of keys.

OLMo 3 has a window on three layers of four; the layers without one may scale their rotary positions.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, OutputNorm, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of

from .llama import DIMS, QK_NORMS, TINY
from .llama import NAMES as LLAMA_NAMES

_EPS = Key("rms_norm_eps", 1e-5)
_BIAS = Key("attention_bias", False)
NAMES = replace(
    LLAMA_NAMES,
    slots={k: v for k, v in LLAMA_NAMES.slots.items() if "norm" not in k}
    | {
        **QK_NORMS,
        "attn_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
_BLOCK = Block(
    norm=RMSNorm(eps=_EPS),
    attention=GroupedQuery(
        qkv_bias=_BIAS,
        out_bias=_BIAS,
        qk_norm=RMSNorm(eps=_EPS, width="heads*head_dim"),
        k_norm=RMSNorm(eps=_EPS, width="kv_heads*head_dim"),
        norms_all_heads=True,
    ),
    position=Rope(),
    mlp=GatedMLP(Key("hidden_act", "silu")),
    residual=OutputNorm(),
)
_GGUF = GgufFamily("olmo2", config={"hidden_act": "silu"}, has_own_head=True)
_TINY = {**TINY, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "pad_token_id": 1}


def _rope(layer_type: str, *scaling: str) -> Rope:
    """Those of one sort of layers; transformers 5 states them for each, 4 scales those without a window only."""
    nested = f"rope_parameters.{layer_type}"
    return Rope(
        theta=Key((f"{nested}.rope_theta", *(f"{name}.rope_theta" for name in scaling), "rope_theta"), 500000.0),
        scaling=Key((nested, *scaling), None),
    )


_LOCAL, _GLOBAL = _rope("sliding_attention"), _rope("full_attention", "rope_scaling")


def _block(config: Mapping[str, Any], i: int) -> Block:
    is_local = is_sliding(config, i, lambda i: bool((i + 1) % 4))
    attention = replace(_BLOCK.attention, window=window_of(config, 4096) if is_local else None)
    return replace(_BLOCK, attention=attention, position=_LOCAL if is_local else _GLOBAL)


OLMO_2 = Architecture(
    name="olmo2",
    releases=("OLMo 2 1B", "OLMo 2 7B", "OLMo 2 13B", "OLMo 2 32B"),
    matches=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    dims=DIMS,
    block=_BLOCK,
    names=NAMES,
    gguf=_GGUF,
    tiny=_TINY,
    variants={"multi-head": {"num_key_value_heads": 4, "tie_word_embeddings": True}, "bias": {"attention_bias": True}},
)

OLMO_3 = replace(
    OLMO_2,
    name="olmo3",
    releases=("Olmo 3 7B", "Olmo 3 32B"),
    matches=("Olmo3ForCausalLM",),
    model_types=("olmo3",),
    block=PerLayer(_block),
    unused=("sliding_window",),  # where no layer has one
    gguf=replace(_GGUF, has_windows=True, claims=lambda metadata, _: "attention.sliding_window" in metadata),
    tiny={**_TINY, "num_hidden_layers": 4, "sliding_window": 7},
    variants={
        "yarn": {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            }
        },
        "transformers-5": {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_theta": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    },
)
