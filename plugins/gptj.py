"""GPT-J-6B (Wang & Komatsuzaki 2021) and what was tuned from it: Pygmalion-6B, GPT4All-J, Dolly v1."""

from __future__ import annotations

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GroupedQuery, Head, LayerNorm, PlainMLP, Rope, SharedParallel
from llmkit.architecture.names import Names

_HIDDEN = Key(("n_embd", "hidden_size"))
_HEADS = Key(("n_head", "num_attention_heads"))
_HEAD_DIM = Computed(lambda config: lookup(_HIDDEN, config) // lookup(_HEADS, config))
# A null `rotary_dim` turns whole heads; one that is absent counts as 64, as in transformers.
_SHARE = Computed(
    lambda config: (
        1.0 if config.get("rotary_dim", 64) is None else config.get("rotary_dim", 64) / lookup(_HEAD_DIM, config)
    )
)

ARCHITECTURE = Architecture(
    name="gptj",
    releases=("GPT-J-6B",),
    matches=("GPTJForCausalLM",),
    model_types=("gptj",),
    dims=Dims(
        hidden=_HIDDEN,
        layers=Key(("n_layer", "num_hidden_layers")),
        heads=_HEADS,
        ffn=Computed(lambda config: config.get("n_inner") or 4 * lookup(_HIDDEN, config)),
        vocab="vocab_size",
        context=Key(("n_positions", "n_ctx", "max_position_embeddings"), None),
    ),
    block=Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
        attention=GroupedQuery(),
        position=Rope(theta=10000.0, share=_SHARE, pairs="interleaved"),
        mlp=PlainMLP(Key("activation_function", "gelu_new")),
        residual=SharedParallel(),
    ),
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
        prefix="transformer.",
    ),
    tiny={
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "n_inner": None,
        "vocab_size": 96,
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
