"""XGLM (Lin et al. 2021, arXiv:2112.10668): OPT's layers, with sines and cosines instead of learned positions."""

from __future__ import annotations

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Block,
    Embedding,
    GroupedQuery,
    Head,
    LayerNorm,
    NoPositions,
    PlainMLP,
    SinusoidalPositions,
)
from llmkit.architecture.names import Names

from .opt import ARCHITECTURE as OPT

# Where a config has both names, transformers takes the common one.
_HIDDEN = Key(("hidden_size", "d_model"))
_OFFSET = 2  # the rows before the first position stood for padding
_SCALE = Computed(
    lambda config: lookup(_HIDDEN, config) ** 0.5 if lookup(Key("scale_embedding", True), config) else None
)

ARCHITECTURE = Architecture(
    name="xglm",
    releases=("XGLM",),
    matches=("XGLMForCausalLM",),
    model_types=("xglm",),
    dims=Dims(
        hidden=_HIDDEN,
        layers=Key(("num_hidden_layers", "num_layers")),
        heads=Key(("num_attention_heads", "attention_heads")),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn="ffn_dim",
    ),
    embedding=Embedding(scale=_SCALE, positions=SinusoidalPositions(offset=_OFFSET, empty=Key("pad_token_id", 1))),
    block=Block(
        norm=LayerNorm(eps=1e-5),
        attention=GroupedQuery(qkv_bias=True, out_bias=True),
        position=NoPositions(),
        mlp=PlainMLP(Key("activation_function", "gelu")),
    ),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=Names(
        embed="model.embed_tokens",
        final_norm="model.layer_norm",
        head="lm_head",
        block="model.layers.{i}.",
        slots=OPT.names.slots,
        ignored=("model.embed_positions.weights",),
    ),
    tiny={
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "activation_function": "gelu",
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    variants={"unscaled": {"scale_embedding": False, "tie_word_embeddings": False, "pad_token_id": 9}},
)
