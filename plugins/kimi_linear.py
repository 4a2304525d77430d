"""Kimi Linear: three layers of the delta rule with decays of channels, then latent attention without positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.deltanet import KimiDeltaAttention, delta_sizes
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, Head, NoPositions, PerLayer, RMSNorm
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.layer_types import layer_type, listed_type
from llmkit.architecture.names import linears

from . import latent
from .deepseek2 import ACTIVATION, mlp_of
from .deepseek3 import ROUTER
from .kimi_gguf import GGUF

_SORTS = ("linear_attention", "full_attention")
_PARTS, _MOE = {"gate": 1, "up": 3, "down": 2}, "block_sparse_moe"  # an expert's w1, w3, w2
_EPS = Key("rms_norm_eps", 1e-5)
_IN = "linear_attn_config"  # the releases nest the sizes of these layers; what is nested wins
_LISTS = {f"{_IN}.kda_layers": _SORTS[0], f"{_IN}.full_attn_layers": _SORTS[1]}
_ROUTER = replace(
    ROUTER,
    count=Key(("num_experts", "num_local_experts"), 256),
    top_k=Key(("num_experts_per_token", "num_experts_per_tok"), 8),
    is_normalized=Key(("moe_renormalize", "norm_topk_prob"), True),
    scale=Key("routed_scaling_factor", 2.446),
    groups=Key(("num_expert_group", "n_group"), 1),
    top_groups=Key("topk_group", 1),
)
_SHARED = Key(("num_shared_experts", "n_shared_experts"), 1)
_SIZES = {
    "expert_ffn": Key("moe_intermediate_size", 1024),
    **delta_sizes(
        heads=Key((f"{_IN}.num_heads", "linear_num_heads"), 32),
        width=Key((f"{_IN}.head_dim", "linear_head_dim"), 128),
        kernel=Key((f"{_IN}.short_conv_kernel_size", "linear_conv_kernel_dim"), 4),
    ),
}


def _block(config: Mapping[str, Any], i: int) -> Block:
    full = LatentAttention(
        bias=Key("attention_bias", False),
        compressed_queries=Computed(lambda config: config.get("q_lora_rank") is not None),
        temperature=1.0,
    )
    listed = listed_type(config, i, _LISTS) if config.get("layer_types") is None else None
    sort = listed or layer_type(config, i, _SORTS, lambda i: _SORTS[i > 0 and i % 4 == 0])
    delta = KimiDeltaAttention(norm=RMSNorm(eps=_EPS, width="delta_key_dim"), act=ACTIVATION)
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=full if sort == _SORTS[1] else delta,
        position=NoPositions(),
        mlp=mlp_of(config, i, _ROUTER, n_dense=1, shared_key=_SHARED),
    )


ARCHITECTURE = Architecture(
    name="kimi_linear",
    releases=("Kimi-Linear-48B-A3B",),
    matches=("KimiLinearForCausalLM",),
    model_types=("kimi_linear",),
    dims=replace(latent.dims(_SIZES, q_rank=None), context=Key(("model_max_length", "max_position_embeddings"), 2**20)),
    block=PerLayer(_block),
    head=Head(tied=False),  # the class ties nothing
    names=replace(
        latent.NAMES,
        slots={
            **latent.NAMES.slots,
            **linears("attn", "self_attn", "kv"),
            **{f"attn.conv_{part}": f"self_attn.{part}_conv1d" for part in "qkv"},
            **{f"attn.{name}_{part}": f"self_attn.{name[0].replace('d', 'f')}_{part}_proj"
               for name in ("decay", "gate") for part in "ab"},
            "attn.rate": "self_attn.b_proj",
            **{f"attn.{name}": f"self_attn.{name}" for name in ("dt_bias", "A_log")},
            "attn.out_norm": "self_attn.o_norm",
            "mlp.router": f"{_MOE}.gate",
            "mlp.router.correction": f"{_MOE}.gate.e_score_correction_bias",
            **{f"mlp.experts.{{e}}.{part}": f"{_MOE}.experts.{{e}}.w{n}" for part, n in _PARTS.items()},
            **linears("mlp.shared", f"{_MOE}.shared_experts"),
        },
        # As transformers 5 has them in memory; its files have dense layers so, too.
        in_memory={
            **{f"self_attn.f_{part}_proj": f"self_attn.forget_gate.f_{part}_proj" for part in "ab"},
            **{f"{_MOE}.{stem}": f"mlp.{stem}" for stem in (
                "gate", *(f"{shared}{part}_proj" for shared in ("", "shared_experts.") for part in _PARTS))},
        },
        respelled={f".{_MOE}.{part}_proj.": f".mlp.{part}_proj." for part in _PARTS},
    ),
    fixed={
        **latent.ONE_KEY_EACH, "mla_use_nope": True, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1,
    },
    unused=(*latent.FOLLOWING, "rope_*", "use_grouped_topk", "num_nextn_predict_layers", "first_k_dense_replace",
            "linear_*", "output_router_logits", "tie_word_embeddings"),
    gguf=GGUF,
    loader_limits={
        "weight_packed": "transformers 5 does not read packed integers where it joins convolutions, which it drops: "
        "--type fp8",
    },
    tiny={
        **{k: v for k, v in latent.TINY.items() if k not in ("rope_theta", "q_lora_rank", "max_position_embeddings")},
        "num_hidden_layers": 3, "layer_types": [_SORTS[0], _SORTS[1], _SORTS[0]], "linear_num_heads": 4,
        "linear_head_dim": 16, "linear_conv_kernel_dim": 4, "num_experts": 8, "num_experts_per_token": 3,
        "num_shared_experts": 1, "moe_intermediate_size": 16, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5,
        "model_max_length": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    },
    variants={
        "published": {
            "layer_types": None, "first_k_dense_replace": 2, "num_expert_group": 4, "topk_group": 2,
            "linear_attn_config": {
                "full_attn_layers": [3], "kda_layers": [1, 2], "num_heads": 4, "head_dim": 20,
                "short_conv_kernel_size": 3,
            },
        },
        "compressed-queries": {
            "q_lora_rank": 24, "attention_bias": True, "num_shared_experts": 2, "moe_renormalize": False,
            "mlp_layer_types": ["sparse", "dense", "sparse"], "linear_num_heads": 3,
        },
    },
)  # fmt: skip
