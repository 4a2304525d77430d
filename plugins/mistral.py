"""Mistral 7B, Nemo and what is stored in that layout: Llama's, in the first release with a window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope
from llmkit.architecture.layer_types import window_of

from .llama import DIMS, NAMES, TINY


def is_ministral(config: Mapping[str, Any]) -> bool:
    """Whether a config is Ministral's: one of Mistral's with sorts of layers is, to AutoConfig of transformers 5."""
    return config.get("model_type") == "ministral" or "layer_types" in config


def as_transformers_reads(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config in the words of the class that AutoModel takes."""
    if not is_ministral(config):
        return config
    return {**config, "architectures": ["MinistralForCausalLM"], "model_type": "ministral"}


ARCHITECTURE = Architecture(
    name="mistral",
    releases=("Mistral 7B", "Mistral Nemo"),
    matches=("MistralForCausalLM",),
    model_types=("mistral",),
    when=lambda config: not is_ministral(config),
    reference_config=as_transformers_reads,
    dims=DIMS,
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        # The first release's code had a window of 4096 before its config said so; later releases state null.
        attention=GroupedQuery(window=Computed(lambda config: window_of(config, 4096))),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
    ),
    names=NAMES,
    # Written as llama's; only a window tells such a file from one.
    gguf=GgufFamily("llama", pairs="interleaved", claims=lambda metadata, _: "attention.sliding_window" in metadata),
    optimum_reads={"mistral": ("kv_heads",)},
    tiny={**TINY, "rms_norm_eps": 1e-5, "sliding_window": 7, "bos_token_id": 1, "eos_token_id": 2},
    variants={
        "window-of-one": {"sliding_window": 1},
        "window-beyond": {"sliding_window": 4096, "rope_theta": 1000000.0},
        "window-default": {"sliding_window": None},
        "nemo": {"head_dim": 16, "sliding_window": 9},
        "tied": {"tie_word_embeddings": True},
        "transformers-5": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    },
)
