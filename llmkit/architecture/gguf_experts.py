"""Metadata of GGUF files: dense layers first, then experts beside shared ones (DeepSeek's and its followers')."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.experts import Experts
from llmkit.architecture.keys import as_bool, as_float
from llmkit.architecture.model import Model

_GATING = {"softmax": 1, "sigmoid": 2}
DENSE_FIRST_KEYS: Mapping[str, str] = {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
"""Metadata key -> key of config.json, as most families call it."""


def dense_first_metadata(model: Model) -> dict[str, Any]:
    """The metadata of these layers; groups that all can be chosen are none, as llama.cpp has it."""
    mlps = [getattr(block, "mlp", None) for block in model.blocks]
    experts = next(mlp for mlp in mlps if isinstance(mlp, Experts))
    router = experts.router
    groups, top_groups = router.choice_of_groups
    limits = {"expert_group_count": groups, "expert_group_used_count": top_groups} if top_groups < groups else {}
    return {
        "leading_dense_block_count": sum(not isinstance(mlp, Experts) for mlp in mlps),
        "expert_shared_count": model.dims.evaluate(experts.shared or "0") // model.dims.evaluate(experts.width),
        "expert_shared_feed_forward_length": None,
        "expert_weights_scale": as_float(router.scale),
        "expert_weights_norm": as_bool(router.is_normalized),
        "expert_gating_func": _GATING[router.scores],
        **limits,
    }


def needs_pairs_of_groups(model: Model) -> str | None:
    """Why llama.cpp cannot run a model that chooses groups otherwise than by the sum of their two best experts."""
    routers = [mlp.router for block in model.blocks if isinstance(mlp := getattr(block, "mlp", None), Experts)]
    for router in routers:
        groups, top_groups = router.choice_of_groups
        if top_groups < groups and router.group_score != "top2":
            return "it chooses groups by their two best experts, this model by the best"
    return None
