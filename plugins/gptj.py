"""GPT-J-6B (Wang & Komatsuzaki 2021) and what was tuned from it: Pygmalion-6B, GPT4All-J, Dolly v1."""

from __future__ import annotations

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GroupedQuery, Head, LayerNorm, PlainMLP, Rope, SharedParallel
from llmkit.architecture.names import Names
from llmkit.architecture.scaling import NoScaling

# Where a config has both names, transformers takes the common one.
HIDDEN = Key(("hidden_size", "n_embd"))
_HEADS = Key(("num_attention_heads", "n_head"))
HEAD_DIM = Computed(lambda config: lookup(HIDDEN, config) // lookup(_HEADS, config))
# A null `rotary_dim` rotates whole heads; one that is absent counts as 64, as in transformers.
_SHARE = Computed(
    lambda config: (
        1.0 if config.get("rotary_dim", 64) is None else config.get("rotary_dim", 64) / lookup(HEAD_DIM, config)
    )
)

BLOCK = Block(
    norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
    attention=GroupedQuery(),
    position=Rope(theta=10000.0, scaling=NoScaling(), share=_SHARE, pairs="interleaved"),
    mlp=PlainMLP(Key("activation_function", "gelu_new")),
    residual=SharedParallel(),
)

ARCHITECTURE = Architecture(
    name="gptj",
    releases=("GPT-J-6B",),
    matches=("GPTJForCausalLM",),
    model_types=("gptj",),
    dims=Dims(
        hidden=HIDDEN,
        layers=Key(("num_hidden_layers", "n_layer")),
        heads=_HEADS,
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(lambda config: config.get("n_inner") or 4 * lookup(HIDDEN, config)),
        vocab="vocab_size",
        context=Key(("max_position_embeddings", "n_positions", "n_ctx"), None),
    ),
    block=BLOCK,
    unused=("rotary", "scale_attn_weights"),
    head=Head(tied=Key("tie_word_embeddings", False), bias=True),
    names=Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={
            "attn_norm": "ln_1",
            "attn.q": "attn.q_proj",
            "attn.k": "attn.k_proj",
            "attn.v": "attn.v_proj",
            "attn.o": "attn.out_proj",
            "mlp.up": "mlp.fc_in",
            "mlp.down": "mlp.fc_out",
        },
        ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
    no_gguf="llama.cpp has a name for it and no graph",
    tiny={
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 95,
        "eos_token_id": 95,
    },
    variants={
        "whole-heads": {"rotary_dim": 16},
        "narrow-mlp": {"n_inner": 48},
    },
)
