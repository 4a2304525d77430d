"""Kimi Linear: three layers of the delta rule with decays of channels, then latent attention without positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.deltanet import KimiDeltaAttention
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GatedMLP, Head, Kind, NoPositions, PerLayer, RMSNorm
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.layer_types import layer_type
from llmkit.errors import SpecError

from . import latent

_SORTS, _MLPS = ("linear_attention", "full_attention"), ("dense", "sparse")
_EPS, _ACT = Key("rms_norm_eps", 1e-5), Key("hidden_act", "silu")
_IN = "linear_attn_config"  # the releases nest the sizes of these layers; what is nested wins
_HEADS = Key((f"{_IN}.num_heads", "linear_num_heads"), 32)
_WIDTH = Key((f"{_IN}.head_dim", "linear_head_dim"), 128)
_ROUTER = Router(
    count=Key(("num_experts", "num_local_experts"), 256),
    top_k=Key(("num_experts_per_token", "num_experts_per_tok"), 8),
    scores="sigmoid",
    is_normalized=Key(("moe_renormalize", "norm_topk_prob"), True),
    epsilon=1e-20,
    scale=Key("routed_scaling_factor", 2.446),
    correction=True,
    groups=Key(("num_expert_group", "n_group"), 1),
    top_groups=Key("topk_group", 1),
    group_score="top2",
    is_single=True,
)


def _sort(config: Mapping[str, Any], i: int) -> str:
    """The sort of layer `i`: as `layer_types` says, as the releases list them (from 1 on), or every fourth full."""
    nested = config.get(_IN) or {}
    full, linear = nested.get("full_attn_layers"), nested.get("kda_layers")
    if config.get("layer_types") is not None or full is None or linear is None:
        return layer_type(config, i, _SORTS, lambda i: _SORTS[i > 0 and i % 4 == 0])
    if (i + 1 in full) == (i + 1 in linear):
        raise SpecError(f"config.json: {_IN} must name layer {i + 1} in full_attn_layers or in kda_layers")
    return _SORTS[i + 1 in full]


def _mlp(config: Mapping[str, Any], i: int) -> Kind:
    types = config.get("mlp_layer_types")
    if types is not None and (not isinstance(types, list) or len(types) <= i or types[i] not in _MLPS):
        raise SpecError(f"config.json: mlp_layer_types must have one of {', '.join(_MLPS)} for layer {i}")
    is_dense = i < lookup(Key("first_k_dense_replace", 1), config) if types is None else types[i] == _MLPS[0]
    shared = lookup(Key(("num_shared_experts", "n_shared_experts"), 1), config)
    return GatedMLP(_ACT) if is_dense else Experts(_ACT, router=_ROUTER, shared=f"{shared}*expert_ffn")


def _block(config: Mapping[str, Any], i: int) -> Block:
    full = LatentAttention(
        bias=Key("attention_bias", False),
        compressed_queries=Computed(lambda config: config.get("q_lora_rank") is not None),
        temperature=1.0,
    )
    delta = KimiDeltaAttention(norm=RMSNorm(eps=_EPS, width="delta_key_dim"), act=_ACT)
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=full if _sort(config, i) == _SORTS[1] else delta,
        position=NoPositions(),
        mlp=_mlp(config, i),
    )


ARCHITECTURE = Architecture(
    name="kimi_linear",
    releases=("Kimi-Linear-48B-A3B",),
    matches=("KimiLinearForCausalLM",),
    model_types=("kimi_linear",),
    dims=replace(
        latent.dims(
            {
                "expert_ffn": Key("moe_intermediate_size", 1024),
                "delta_key_heads": _HEADS,
                "delta_value_heads": _HEADS,
                "delta_key_dim": _WIDTH,
                "delta_value_dim": _WIDTH,
                "delta_kernel": Key((f"{_IN}.short_conv_kernel_size", "linear_conv_kernel_dim"), 4),
            },
            q_rank=None,
        ),
        context=Key(("model_max_length", "max_position_embeddings"), 1048576),
    ),
    block=PerLayer(_block),
    head=Head(),  # the class ties nothing
    names=replace(
        latent.NAMES,
        slots={
            **latent.NAMES.slots,
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            **{f"attn.conv_{part}": f"self_attn.{part}_conv1d" for part in "qkv"},
            "attn.rate": "self_attn.b_proj",
            **{f"attn.decay_{part}": f"self_attn.f_{part}_proj" for part in "ab"},
            **{f"attn.gate_{part}": f"self_attn.g_{part}_proj" for part in "ab"},
            "attn.dt_bias": "self_attn.dt_bias",
            "attn.A_log": "self_attn.A_log",
            "attn.out_norm": "self_attn.o_norm",
            "mlp.router": "block_sparse_moe.gate",
            "mlp.router.correction": "block_sparse_moe.gate.e_score_correction_bias",
            "mlp.experts.{e}.gate": "block_sparse_moe.experts.{e}.w1",
            "mlp.experts.{e}.up": "block_sparse_moe.experts.{e}.w3",
            "mlp.experts.{e}.down": "block_sparse_moe.experts.{e}.w2",
            **{f"mlp.shared.{p}": f"block_sparse_moe.shared_experts.{p}_proj" for p in ("gate", "up", "down")},
        },
        # As transformers 5 has them in memory.
        in_memory={
            **{f"self_attn.f_{part}_proj": f"self_attn.forget_gate.f_{part}_proj" for part in "ab"},
            **{f"block_sparse_moe.{part}": f"mlp.{part}" for part in (
                "gate", *(f"{shared}{p}_proj" for shared in ("", "shared_experts.") for p in ("gate", "up", "down")))},
        },
        # Its files by transformers 5 have dense layers so, too.
        respelled={f".block_sparse_moe.{part}_proj.": f".mlp.{part}_proj." for part in ("gate", "up", "down")},
    ),
    fixed={
        **latent.ONE_KEY_EACH,
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    unused=(*latent.FOLLOWING, "rope_*", "use_grouped_topk", "num_nextn_predict_layers", "first_k_dense_replace",
            "linear_*", "output_router_logits", "tie_word_embeddings"),
    no_gguf="its files keep two halves of kv_b, and convolutions as matrices, which is not read or written yet",
    tiny={
        **{k: v for k, v in latent.TINY.items() if k not in ("rope_theta", "q_lora_rank", "max_position_embeddings")},
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_heads": 3,
        "linear_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "model_max_length": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    variants={
        "published": {
            "layer_types": None,
            "linear_attn_config": {
                "full_attn_layers": [3], "kda_layers": [1, 2], "num_heads": 2, "head_dim": 20,
                "short_conv_kernel_size": 3,
            },
            "first_k_dense_replace": 2,
            "num_expert_group": 4,
            "topk_group": 2,
            "moe_renormalize": False,
        },
        "compressed-queries": {"q_lora_rank": 24, "attention_bias": True, "num_shared_experts": 2,
                               "mlp_layer_types": ["sparse", "dense", "sparse"]},
    },
)  # fmt: skip
