"""CodeGen (Nijkamp et al. 2022), and MOSS (Fudan 2023), which was trained from it: GPT-J's layers with q, v, k as one.

The rows of that matrix lie as four machines had them: in each quarter those of q, then of v, then of k. transformers
has no class of MOSS; its outputs are recorded in tests/golden. Source: modeling_moss.py (OpenMOSS/MOSS).
"""

from __future__ import annotations

from dataclasses import replace

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GroupedQuery, Head, LayerNorm, PlainMLP, Rope, SharedParallel
from llmkit.architecture.names import Fused, Names
from llmkit.architecture.scaling import NoScaling

# Where a config has both names, transformers takes the common one.
_HIDDEN = Key(("hidden_size", "n_embd"))
_HEADS = Key(("num_attention_heads", "n_head"))
_SHARE = Computed(
    lambda config: lookup(Key("rotary_dim", 64), config) / (lookup(_HIDDEN, config) // lookup(_HEADS, config))
)

ARCHITECTURE = Architecture(
    name="codegen",
    releases=("CodeGen", "CodeGen2"),
    matches=("CodeGenForCausalLM", "CodeGenModel"),
    model_types=("codegen",),
    dims=Dims(
        hidden=_HIDDEN,
        layers=Key(("num_hidden_layers", "n_layer")),
        heads=_HEADS,
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(lambda config: config.get("n_inner") or 4 * lookup(_HIDDEN, config)),
        vocab="vocab_size",
        context=Key(("max_position_embeddings", "n_positions", "n_ctx"), None),
        extra={"shards": Computed(lambda config: lookup(_HIDDEN, config) // (lookup(_HIDDEN, config) // 4))},
    ),
    block=Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
        attention=GroupedQuery(),
        position=Rope(theta=10000.0, scaling=NoScaling(), share=_SHARE, pairs="interleaved"),
        mlp=PlainMLP(Key("activation_function", "gelu_new")),
        residual=SharedParallel(),
    ),
    unused=("gradient_checkpointing", "scale_attn_weights"),
    head=Head(tied=Key("tie_word_embeddings", False), bias=True),
    names=Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={
            "attn_norm": "ln_1",
            "attn.qkv": Fused("attn.qkv_proj", ("q", "v", "k"), rows="per_group", groups="shards"),
            "attn.o": "attn.out_proj",
            "mlp.up": "mlp.fc_in",
            "mlp.down": "mlp.fc_out",
        },
        ignored=("*.attn.causal_mask",),
    ),
    tiny={
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": None,
        "rotary_dim": 4,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 95,
        "eos_token_id": 95,
    },
    variants={"wide-heads": {"n_embd": 64, "rotary_dim": 16, "n_inner": 48}},
)

MOSS = replace(
    ARCHITECTURE,
    name="moss",
    releases=("MOSS-003",),
    matches=("MossForCausalLM",),
    model_types=("moss",),
    described_as=lambda config: {**config, "architectures": ["CodeGenForCausalLM"], "model_type": "codegen"},
    fixed={"wbits": 32},
    unused=(*ARCHITECTURE.unused, "groupsize"),
    tiny={**ARCHITECTURE.tiny, "architectures": ["MossForCausalLM"], "model_type": "moss", "wbits": 32},
    variants={},
)
