"""Hunyuan (dense): Llama's layers with a norm on each head of queries and keys, after their positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key, as_float, lookup
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope
from llmkit.architecture.positions import THETA_KEYS
from llmkit.architecture.scaling import NoScaling

from .llama import DIMS, TINY
from .llama import NAMES as LLAMA_NAMES

NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-5))
_BIAS = Key("attention_bias", False)
NAMES = replace(
    LLAMA_NAMES,
    slots={**LLAMA_NAMES.slots, "attn.q_norm": "self_attn.query_layernorm", "attn.k_norm": "self_attn.key_layernorm"},
)


def _rope(config: Mapping[str, Any]) -> Rope:
    """A scaling that is called dynamic and states `alpha` is none: the base is theta * alpha^(d / (d - 2))."""
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    alpha = params.get("alpha")
    if not alpha or params.get("rope_type", params.get("type")) != "dynamic":
        return Rope()
    dim = DIMS.bind(config).head_dim
    theta = as_float(lookup(Key(THETA_KEYS, 10000.0), config), "rope_theta")
    return Rope(theta=theta * as_float(alpha, "rope_scaling.alpha") ** (dim / (dim - 2)), scaling=NoScaling())


POSITION = Computed(_rope)
ATTENTION = GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=replace(NORM, width="head_dim"), norms_rotated=True)

ARCHITECTURE = Architecture(
    name="hunyuan",
    releases=("Hunyuan-0.5B", "Hunyuan-1.8B", "Hunyuan-4B", "Hunyuan-7B"),
    matches=("HunYuanDenseV1ForCausalLM",),
    model_types=("hunyuan_v1_dense",),
    dims=DIMS,
    block=Block(norm=NORM, attention=ATTENTION, position=POSITION, mlp=GatedMLP(Key("hidden_act", "silu"))),
    unused=(
        "use_qk_norm",
        "use_rotary_pos_emb",
        "attention_head_dim",
        "mlp_hidden_act",
        "norm_type",
        "pool_type",
        "add_classification_head",
        "class_num",
        "org_vocab_size",
        "use_cla",
        "cla_share_factor",
        "im_*",
        "text_*_id",
        "mask_init_id",
        "enable_lm_head_fp32",
        "rope_*.factor",
        "rope_*.beta_*",
        "rope_*.mscale*",
    ),
    names=NAMES,
    gguf=GgufFamily("hunyuan-dense", config={"hidden_act": "silu"}),
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "head_dim": 16,
        "rope_scaling": {
            "type": "dynamic",
            "alpha": 1000.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    variants={"plain": {"rope_scaling": None, "attention_bias": True, "tie_word_embeddings": False}},
)
