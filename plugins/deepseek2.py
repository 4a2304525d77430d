"""DeepSeek-V2: latent attention, dense layers first, then experts, some of which every token goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GatedMLP, Head, Kind, PerLayer
from llmkit.architecture.layer_types import is_dense
from llmkit.architecture.names import linears

from . import latent
from .deepseek_gguf import GGUF

ACTIVATION = Key("hidden_act", "silu")
EXPERT_SLOTS = {
    "mlp.router": "mlp.gate",
    "mlp.router.correction": "mlp.gate.e_score_correction_bias",
    **linears("mlp.experts.{e}", "mlp.experts.{e}"),
    **linears("mlp.shared", "mlp.shared_experts"),
}
NAMES = replace(latent.NAMES, slots={**latent.NAMES.slots, **EXPERT_SLOTS})


_SHARED = Key(("n_shared_experts", "num_shared_experts"), 1)


def mixture(config: Mapping[str, Any], router: Router, shared_key: Key = _SHARED) -> Experts:
    """Experts, and so many of them side by side that every token goes through."""
    shared = lookup(shared_key, config)
    return Experts(ACTIVATION, router=router, shared=f"{shared}*expert_ffn")


def mlp_of(config: Mapping[str, Any], i: int, router: Router, *, n_dense: int, shared_key: Key = _SHARED) -> Kind:
    """The MLP of layer `i`: dense layers first, then experts; with the defaults of the config's class."""
    return GatedMLP(ACTIVATION) if is_dense(config, i, n_dense) else mixture(config, router, shared_key)


def blocks(router: Router, *, n_dense: int, shared_key: Key = _SHARED) -> PerLayer:
    """All layers of a model."""

    def block(config: Mapping[str, Any], i: int) -> Block:
        return latent.block(config, mlp_of(config, i, router, n_dense=n_dense, shared_key=shared_key))

    return PerLayer(block)


def _groups(key: str) -> Computed:
    """V2 has the number of groups in its config also where the choice is not limited to them."""
    return Computed(lambda config: config[key] if config.get("topk_method") == "group_limited_greedy" else 1)


TINY: dict[str, Any] = {
    **latent.TINY,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
YARN: dict[str, Any] = {
    "rope_theta": None,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 0.8,
    },
}  # fmt: skip
NOT_COMPUTED = (
    *latent.FOLLOWING,
    "num_nextn_predict_layers",
    "ep_size",
    "seq_aux",
    "aux_loss_alpha",
    "output_router_logits",
)

ARCHITECTURE = Architecture(
    name="deepseek2",
    releases=("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-Coder-V2"),
    matches=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    dims=latent.dims({"expert_ffn": Key("moe_intermediate_size", 1407)}),
    block=blocks(
        Router(
            count=Key("n_routed_experts", 64),
            top_k=Key("num_experts_per_tok"),
            scale=Key("routed_scaling_factor", 1.0),
            groups=_groups("n_group"),
            top_groups=_groups("topk_group"),
            is_single=True,
        ),
        n_dense=0,
        shared_key=Key(_SHARED.names, 2),
    ),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=NAMES,
    fixed={
        **latent.ONE_KEY_EACH,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "mlp_bias": False,
    },
    unused=(*NOT_COMPUTED, "n_group", "topk_group"),  # where the choice is not limited
    gguf=GGUF,
    tiny={**TINY, "topk_method": "greedy"},
    variants={
        "plain-queries": {"q_lora_rank": None, "attention_bias": True},
        "groups": {
            "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
        },
        "yarn": {**YARN, "rope_parameters": {**YARN["rope_parameters"], "mscale": 0.8}},
    },
)  # fmt: skip
