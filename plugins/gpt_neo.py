"""GPT-Neo (Black et al. 2021): every other layer sees a window, and scores are not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Block,
    Embedding,
    GroupedQuery,
    Head,
    LayerNorm,
    LearnedPositions,
    NoPositions,
    PerLayer,
    PlainMLP,
)
from llmkit.architecture.names import Names
from llmkit.errors import SpecError

# Where a config has both names, transformers takes the common one.
_LAYERS = Key(("num_hidden_layers", "num_layers"))
_DEFAULT_TYPES = [[["global", "local"], 12]]


def _block(config: Mapping[str, Any], layer: int) -> Block:
    groups = lookup(Key("attention_types", _DEFAULT_TYPES), config)
    types = [sort for sorts, times in groups for _ in range(times) for sort in sorts]
    if len(types) != lookup(_LAYERS, config) or types[layer] not in ("global", "local"):
        raise SpecError(
            f"config.json: attention_types is {groups!r:.60}, expected `global` or `local` for each of "
            f"{lookup(_LAYERS, config)} layers"
        )
    window = lookup(Key("window_size", 256), config) if types[layer] == "local" else None
    return Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
        attention=GroupedQuery(out_bias=True, scale=1.0, window=window),
        position=NoPositions(),
        mlp=PlainMLP(Key("activation_function", "gelu_new")),
    )


ARCHITECTURE = Architecture(
    name="gpt_neo",
    releases=("GPT-Neo",),
    matches=("GPTNeoForCausalLM", "GPTNeoModel"),
    model_types=("gpt_neo",),
    dims=Dims(
        layers=_LAYERS,
        heads=Key(("num_attention_heads", "num_heads")),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(lambda config: config.get("intermediate_size") or 4 * lookup(Key("hidden_size"), config)),
        context="max_position_embeddings",
    ),
    embedding=Embedding(positions=LearnedPositions()),
    block=PerLayer(_block),
    unused=("attention_layers", "window_size"),  # the first follows from `attention_types`
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={
            "attn_norm": "ln_1",
            "attn.q": "attn.attention.q_proj",
            "attn.k": "attn.attention.k_proj",
            "attn.v": "attn.attention.v_proj",
            "attn.o": "attn.attention.out_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        outer={"positions": "transformer.wpe"},
        ignored=("*.attn.attention.bias", "*.attn.attention.masked_bias"),
    ),
    tiny={
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": None,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 7,
        "max_position_embeddings": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 95,
        "eos_token_id": 95,
    },
    variants={"narrow-mlp": {"intermediate_size": 48, "tie_word_embeddings": False}},
)
