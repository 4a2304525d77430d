"""BLOOM and BLOOMZ (BigScience 2022), and what was tuned from them: BELLE-7B, Phoenix, XuanYuan."""

from __future__ import annotations

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Alibi,
    Block,
    Embedding,
    GroupedQuery,
    Head,
    LayerNorm,
    NormedResidual,
    PlainMLP,
    PreNorm,
)
from llmkit.architecture.names import Names

from .gpt_neox import megatron

# Where a config has several names, transformers takes the first of these.
_HIDDEN = Key(("n_embed", "hidden_size", "n_embd"))
_NORM = LayerNorm(eps=Key("layer_norm_epsilon", 1e-5))


_TINY = {
    "hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": 64, "layer_norm_epsilon": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="bloom",
    releases=("BLOOM", "BLOOMZ", "BELLE-7B", "Phoenix", "XuanYuan"),
    matches=("BloomForCausalLM", "BloomModel"),
    model_types=("bloom",),
    dims=Dims(
        hidden=_HIDDEN,
        layers=Key(("num_hidden_layers", "n_layer")),
        heads=Key(("num_attention_heads", "n_head")),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(lambda config: 4 * lookup(_HIDDEN, config)),
        context=Key("seq_length", None),
    ),
    embedding=Embedding(norm=_NORM),
    block=Block(
        norm=_NORM,
        attention=GroupedQuery(qkv_bias=True, out_bias=True),
        position=Alibi(),
        mlp=PlainMLP("gelu_pytorch_tanh"),
        residual=Computed(
            lambda config: NormedResidual() if config.get("apply_residual_connection_post_layernorm") else PreNorm()
        ),
    ),
    # A slower computation of the same, but that in several parts it leaves out biases.
    fixed={
        "slow_but_exact": Computed(lambda config: config.get("pretraining_tp", 1) == 1 and config["slow_but_exact"])
    },
    # Switches of the code it was trained with.
    unused=(
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "skip_bias_add*",
    ),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=Names(
        embed="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots=megatron("self_attention"),
        outer={"embed_norm": "transformer.word_embeddings_layernorm"},
        ignored=("*.scale_mask_softmax.causal_mask",),
    ),
    gguf=GgufFamily(
        "bloom",
        slots={"attn.qkv": QKV},
        keys={
            "context_length": "seq_length",
            "block_count": "n_layer",
            "attention.head_count": "n_head",
            "attention.head_count_kv": "",
            "feed_forward_length": "",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        # transformers' class has no such key, llama.cpp needs one; the models were trained with 2048 tokens.
        write=lambda model, _: {"context_length": model.dims.context or 2048},
    ),
    tiny=_TINY,
    variants={
        "2022-keys": {
            "hidden_size": None,
            "n_embed": 32,
            "n_head": None,
            "num_attention_heads": 4,
            "n_layer": None,
            "num_hidden_layers": 2,
        },
        "six-heads": {"hidden_size": 48, "n_head": 6},
        "normed-residual": {"apply_residual_connection_post_layernorm": True},
        "untied": {"tie_word_embeddings": False},
    },
)
