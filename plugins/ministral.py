"""Ministral and Ministral 3 (text): Mistral's layers; those of the third grow queries with their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GroupedQuery, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.model import Model
from llmkit.architecture.positions import QueryGrowth
from llmkit.architecture.scaling import Yarn, scaling_of

from .llama import BLOCK, DIMS, NAMES, TINY
from .mistral import as_transformers_reads, is_ministral

_IN = ("rope_scaling", "rope_parameters")
GROWTH = QueryGrowth(
    beta=Key(tuple(f"{name}.llama_4_scaling_beta" for name in _IN)),
    length=Key(tuple(f"{name}.original_max_position_embeddings" for name in _IN)),
)
_DEFAULT = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
            "mscale_all_dim": 1.0}  # fmt: skip


def _position(config: Mapping[str, Any]) -> Rope:
    if any(config.get(name) for name in _IN):
        return Rope(growth=GROWTH)
    return Rope(1000000.0, scaling_of(_DEFAULT, config), growth=QueryGrowth(0.1, 16384))


def _metadata(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    position = model.block.position if isinstance(model.block, Block) else None
    if not isinstance(position, Rope) or position.growth is None or not isinstance(position.scaling, Yarn):
        return {}
    return {
        "attention.temperature_scale": position.growth.beta,
        "rope.scaling.yarn_log_multiplier": position.scaling.mscale_all_dim,
    }


def _scaling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json calls the scaling; llama.cpp has one number for both of YaRN's mscales."""
    names = {
        "rope.scaling.factor": ("factor",),
        "rope.scaling.original_context_length": ("original_max_position_embeddings",),
        "rope.scaling.yarn_beta_fast": ("beta_fast",),
        "rope.scaling.yarn_beta_slow": ("beta_slow",),
        "rope.scaling.yarn_log_multiplier": ("mscale", "mscale_all_dim"),
        "attention.temperature_scale": ("llama_4_scaling_beta",),
    }
    stated = {name: metadata[key] for key, several in names.items() if key in metadata for name in several}
    rounded = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in stated.items()}
    return {"rope_scaling": {"rope_type": metadata.get("rope.scaling.type"), **rounded}}


def _block(config: Mapping[str, Any], i: int) -> Block:
    width = window_of(config, 4096)
    is_local = width is not None and is_sliding(config, i, lambda i: True)
    return replace(BLOCK, attention=GroupedQuery(window=width if is_local else None))


MINISTRAL = Architecture(
    name="ministral",
    releases=("Ministral-8B-2410 (with layer types)",),
    matches=("MinistralForCausalLM", "MistralForCausalLM"),
    model_types=("ministral", "mistral"),
    when=is_ministral,
    reference_config=as_transformers_reads,
    dims=DIMS,
    block=PerLayer(_block),
    unused=("layer_types",),  # where no layer has a window
    names=NAMES,
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 7,
        "head_dim": 16,
    },
    # As the published config has it, which transformers' AutoConfig takes for Ministral's.
    variants={"mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}},
)

MINISTRAL_3 = replace(
    MINISTRAL,
    name="ministral3",
    releases=("Ministral 3 3B", "Ministral 3 8B", "Ministral 3 14B"),
    matches=("Ministral3ForCausalLM",),
    model_types=("ministral3",),
    when=None,
    reference_config=None,
    dims=replace(DIMS, head_dim=Key("head_dim", 128)),
    block=replace(
        BLOCK,
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(window=Computed(lambda config: window_of(config, None))),
        position=Computed(_position),
    ),
    unused=("layer_types", "rope_*.max_position_embeddings"),
    gguf=GgufFamily("mistral3", pairs="interleaved", config={"hidden_act": "silu"}, read=_scaling, write=_metadata),
    tiny={
        **TINY,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    variants={"window": {"sliding_window": 7, "tie_word_embeddings": True}, "defaults": {"rope_parameters": None}},
)
