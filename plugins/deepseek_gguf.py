"""DeepSeek-V2 and V3 in GGUF files whose kv_b is one tensor: llama.cpp runs those, as well as those that halve it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Experts
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.keys import as_bool, as_float
from llmkit.architecture.kinds import Block, Rope
from llmkit.architecture.model import Model
from llmkit.architecture.scaling import Yarn

from . import latent

_SOFTMAX, _SIGMOID = 1, 2
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def _is_whole(metadata: Metadata, names: Collection[str], scores: int) -> bool:
    return "blk.0.attn_kv_b.weight" in names and metadata.get("expert_gating_func", _SOFTMAX) == scores


def _read(metadata: Metadata) -> dict[str, Any]:
    """What latent attention and experts add; YaRN's two mscales are one number there, a tenth of them."""
    assert latent.GGUF.read is not None  # noqa: S101
    config = dict(latent.GGUF.read(metadata))
    has_groups = "expert_group_count" in metadata
    config |= {"topk_method": "group_limited_greedy" if has_groups else "greedy"}
    multiplier = metadata.get("rope.scaling.yarn_log_multiplier")
    if multiplier is not None:
        mscale = round(10 * multiplier, 6)
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": round(metadata["rope.scaling.factor"], 6),
            "original_max_position_embeddings": metadata["rope.scaling.original_context_length"],
            **{key: metadata[f"rope.scaling.{name}"] for name, key in _YARN.items()},
            "mscale": mscale,
            "mscale_all_dim": mscale,
        }
    return config


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    assert latent.GGUF.write is not None  # noqa: S101
    metadata = dict(latent.GGUF.write(model, config))
    mlps = [block.mlp for block in model.blocks if isinstance(block, Block)]
    experts = next(mlp for mlp in mlps if isinstance(mlp, Experts))
    router, width = experts.router, model.dims.evaluate(experts.width)
    groups, top_groups = router.choice_of_groups
    metadata |= {
        "leading_dense_block_count": sum(not isinstance(mlp, Experts) for mlp in mlps),
        "expert_shared_count": model.dims.evaluate(experts.shared or "0") // width,
        "expert_shared_feed_forward_length": None,
        "expert_weights_scale": as_float(router.scale),
        "expert_weights_norm": as_bool(router.is_normalized),
        "expert_gating_func": _SIGMOID if router.scores == "sigmoid" else _SOFTMAX,
    }
    if groups > 1:
        metadata |= {"expert_group_count": groups, "expert_group_used_count": top_groups}
    scaling = _yarn(model)
    if scaling is not None and scaling.mscale_all_dim:
        metadata["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return metadata


def _yarn(model: Model) -> Yarn | None:
    position = model.block.position if isinstance(model.block, Block) else None
    scaling = position.bound_scaling if isinstance(position, Rope) else None
    return scaling if isinstance(scaling, Yarn) else None


def _refuses(model: Model) -> str | None:
    position = model.block.position if isinstance(model.block, Block) else None
    if isinstance(position, Rope) and position.pairs != "interleaved":
        return "its rotary pairs are the halves of a head, and files have them side by side"
    scaling = _yarn(model)
    if scaling is not None and scaling.mscale != scaling.mscale_all_dim:
        return "it reads one mscale of YaRN, and this model has two"
    experts = [b.mlp for b in model.blocks if isinstance(b, Block) and isinstance(b.mlp, Experts)]
    if not experts:
        return "all its layers are dense"
    groups, top_groups = experts[0].router.choice_of_groups
    if groups != top_groups and experts[0].router.group_score == "max":
        return "it chooses groups by their two best experts, this model by the best"
    return None


GGUF: GgufFamily = replace(
    latent.GGUF,
    keys={
        **latent.GGUF.keys,
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts",
        "expert_shared_feed_forward_length": "",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
    },
    pairs="interleaved",
    read=_read,
    write=_write,
    refuses=_refuses,
    claims=lambda metadata, names: _is_whole(metadata, names, _SOFTMAX),
)
GGUF_V3 = replace(
    GGUF,
    keys={**GGUF.keys, "expert_weights_norm": "norm_topk_prob"},
    config={**GGUF.config, "n_group": 1, "topk_group": 1},
    read=lambda metadata: {**_read(metadata), "topk_method": "noaux_tc"},
    claims=lambda metadata, names: _is_whole(metadata, names, _SIGMOID),
)
