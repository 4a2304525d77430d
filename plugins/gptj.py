"""GPT-J-6B (Wang & Komatsuzaki 2021) and what was tuned from it: Pygmalion-6B, GPT4All-J, Dolly v1."""

from __future__ import annotations

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GroupedQuery, Head, LayerNorm, PlainMLP, Rope, SharedParallel
from llmkit.architecture.names import Names
from llmkit.architecture.scaling import NoScaling

from .gpt2 import DIMS, HEADS, HIDDEN, TINY

HEAD_DIM = Computed(lambda config: lookup(HIDDEN, config) // lookup(HEADS, config))
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
    dims=replace(DIMS, context=Key(("max_position_embeddings", "n_positions", "n_ctx"), None)),
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
    tiny={**TINY, "n_embd": 64, "rotary_dim": 4, "activation_function": "gelu_new", "tie_word_embeddings": False},
    variants={"whole-heads": {"rotary_dim": 16}, "narrow-mlp": {"n_inner": 48}},
)
