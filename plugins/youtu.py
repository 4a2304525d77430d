"""Youtu-LLM: DeepSeek-V3's latent attention in dense layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf_yarn import needs_yarn_to_stretch, yarn_metadata
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import GatedMLP, Head, PerLayer
from llmkit.architecture.model import Model

from . import latent
from .deepseek2 import ACTIVATION
from .deepseek_gguf import compressed, needs_known_queries, read, split

# For llama.cpp it is a DeepSeek-V2 whose layers all come before those with experts.
_KEYS = ("leading_dense_block_count", "expert_shared_count", "expert_feed_forward_length")


def _write(model: Model, _: Mapping[str, Any]) -> dict[str, Any]:
    dense = zip(_KEYS, (model.dims.layers, 0, model.dims.ffn), strict=True)
    return {**compressed(model), **dict(dense), **yarn_metadata(model, takes_both=True)}


_GGUF = replace(
    latent.GGUF,
    keys={**latent.GGUF.keys, **dict.fromkeys(_KEYS, "")},
    pairs="interleaved",
    read=read,
    write=_write,
    noted=("rope_interleave",),
    refuses=lambda model: needs_known_queries(model) or needs_yarn_to_stretch(model),
)

ARCHITECTURE = Architecture(
    name="youtu",
    releases=("Youtu-LLM-2B",),
    matches=("YoutuForCausalLM",),
    model_types=("youtu",),
    dims=latent.dims({}),
    block=PerLayer(lambda config, i: latent.block(config, GatedMLP(ACTIVATION))),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=latent.NAMES,
    fixed={**latent.ONE_KEY_EACH, "mlp_bias": False},
    gguf=split(_GGUF),
    unused=(*latent.FOLLOWING, "embedding_initializer_range"),
    tiny={**latent.TINY, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    variants={
        "half": {"rope_interleave": False, "q_lora_rank": None, "tie_word_embeddings": False},
        "biases": {"attention_bias": True},
    },
)
