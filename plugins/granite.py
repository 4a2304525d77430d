"""Granite 3 and 4 (dense): Llama's layers with a multiplier on embeddings, scores, branches and logits.

Inside Granite Vision (LLaVA-NeXT) logits are scaled, too, as in transformers 4.51 and vLLM; the class of transformers
4.52 to 5.24 leaves it out.
"""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key, as_float, lookup
from llmkit.architecture.kinds import Block, Embedding, GatedMLP, GroupedQuery, Head, RMSNorm, Rope
from llmkit.architecture.model import Model

from .llama import DIMS, GGUF, NAMES, TINY

_BIAS = Key("attention_bias", False)
# As llama.cpp calls them; it divides logits by its `logit_scale`, too.
SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def scale(name: str) -> Key:
    """A multiplier of the config; 1 where it states none."""
    return Key(name, 1.0)


def metadata(model: Model, config: Mapping[str, Any]) -> dict[str, float]:
    """The multipliers of a GGUF file, from config.json."""
    return {key: as_float(lookup(scale(name), config), name) for key, name in SCALES.items()}


EMBEDDING = Embedding(scale=scale("embedding_multiplier"))
HEAD = Head(
    tied=Key("tie_word_embeddings", False),
    scale=Computed(lambda config: 1 / as_float(lookup(scale("logits_scaling"), config), "logits_scaling")),
)

BLOCK = Block(
    norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
    attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, scale=scale("attention_multiplier")),
    position=Rope(),
    mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
    multiplier=scale("residual_multiplier"),
)

ARCHITECTURE = Architecture(
    name="granite",
    releases=("Granite 3.0 to 3.3", "Granite 4.0 (dense)"),
    matches=("GraniteForCausalLM",),
    model_types=("granite",),
    dims=DIMS,
    embedding=EMBEDDING,
    block=BLOCK,
    head=HEAD,
    names=NAMES,
    gguf=GgufFamily(
        "granite",
        pairs=GGUF.pairs,
        keys=SCALES,
        config={"hidden_act": "silu"},
        flags=GGUF.flags,
        write=metadata,
    ),
    optimum_reads={"granite": ("kv_heads",)},
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    variants={
        "defaults": {
            "attention_multiplier": None,
            "embedding_multiplier": None,
            "residual_multiplier": None,
            "logits_scaling": None,
            "tie_word_embeddings": None,
        },
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
)
