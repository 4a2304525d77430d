"""LFM2 with experts: after the first layers a few of 32, chosen by sigmoids with a correction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import needs_both_sorts, needs_experts
from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.kinds import Block, GatedMLP, Head, PerLayer
from llmkit.architecture.model import Model

from .lfm2 import ARCHITECTURE as LFM2
from .lfm2 import block as block_of

_EXPERTS = Experts(
    "silu",
    router=Router(
        count=Key(("num_experts", "num_local_experts"), 32),
        top_k=Key("num_experts_per_tok", 4),
        scores="sigmoid",
        is_normalized=Key("norm_topk_prob", True),
        epsilon=1e-6,
        scale=Key("routed_scaling_factor", 1.0),
        correction=Key("use_expert_bias", True),
    ),
)


def _block(config: Mapping[str, Any], i: int) -> Block:
    is_dense = i < lookup(Key("num_dense_layers", 2), config)
    return replace(block_of(config, i), mlp=GatedMLP("silu") if is_dense else _EXPERTS)


assert LFM2.gguf is not None and LFM2.gguf.write is not None  # noqa: S101, PT018
_write_lfm2 = LFM2.gguf.write


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    n_dense = sum(not isinstance(getattr(block, "mlp", None), Experts) for block in model.blocks)
    return {**_write_lfm2(model, config), "leading_dense_block_count": n_dense, "expert_gating_func": 2}  # sigmoid


ARCHITECTURE = replace(
    LFM2,
    name="lfm2_moe",
    releases=("LFM2-8B-A1B", "LFM2-24B-A2B"),
    matches=("Lfm2MoeForCausalLM",),
    model_types=("lfm2_moe",),
    dims=replace(
        LFM2.dims,
        hidden=Key("hidden_size", 2048),
        ffn=Key("intermediate_size", 7168),
        extra={**LFM2.dims.extra, "expert_ffn": Key("moe_intermediate_size", 1792)},
    ),
    block=PerLayer(_block),
    head=Head(tied=Key(("tie_embedding", "tie_word_embeddings"), True)),
    names=replace(
        LFM2.names,
        slots={
            **LFM2.names.slots,
            "mlp.router": "feed_forward.gate",
            "mlp.router.correction": "feed_forward.expert_bias",
            "mlp.experts.{e}.gate": "feed_forward.experts.{e}.w1",
            "mlp.experts.{e}.up": "feed_forward.experts.{e}.w3",
            "mlp.experts.{e}.down": "feed_forward.experts.{e}.w2",
        },
    ),
    unused=("conv_*", "output_router_logits", "use_pos_enc", "theta"),
    gguf=replace(
        LFM2.gguf,
        arch="lfm2moe",
        keys={**LFM2.gguf.keys, "leading_dense_block_count": "num_dense_layers", "expert_count": "num_experts"},
        config={},
        write=_write,
        refuses=lambda model: needs_experts(model) or needs_both_sorts(model),
    ),
    tiny={
        "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "num_key_value_heads": 2,
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_dense_layers": 1, "num_experts": 6,
        "num_experts_per_tok": 2, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "max_position_embeddings": 64,
        "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    variants={
        "no-correction": {"use_expert_bias": False, "norm_topk_prob": False, "conv_bias": True, "conv_L_cache": 4},
        "sizes": {"num_dense_layers": 0, "routed_scaling_factor": 1.5, "tie_word_embeddings": False},
    },
)  # fmt: skip
