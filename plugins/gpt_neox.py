"""GPT-NeoX-20B (Black et al. 2022), Pythia, RedPajama-INCITE, StableLM-alpha, Dolly, OpenAssistant's Pythia models."""

from __future__ import annotations

from llmkit.architecture.architecture import DERIVED, HIDDEN_PER_HEAD, Architecture, Dims
from llmkit.architecture.gguf import QKV, GgufFamily, rotary_share
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import Block, GroupedQuery, LayerNorm, Parallel, PlainMLP, PreNorm, Rope
from llmkit.architecture.names import Entry, Fused, Names

_BIAS = Key("attention_bias", True)
_IS_PARALLEL = Key("use_parallel_residual", True)
_THETA = ("rope_scaling.rope_theta", "rope_parameters.rope_theta", "rotary_emb_base")
_SHARE = ("rope_scaling.partial_rotary_factor", "rope_parameters.partial_rotary_factor", "rotary_pct")


def megatron(attention: str) -> dict[str, Entry]:
    """The names in a layer of Megatron-LM, which BLOOM, Falcon and ChatGLM have as well."""
    return {
        "attn_norm": "input_layernorm",
        "attn.qkv": Fused(f"{attention}.query_key_value", ("q", "k", "v"), rows="per_group"),
        "attn.o": f"{attention}.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }


_TINY = {
    "intermediate_size": 128, "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
    "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="gpt_neox",
    releases=("Pythia", "RedPajama-INCITE", "StableLM-alpha", "GPT-NeoX-20B", "Dolly v2"),
    matches=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    dims=Dims(kv_heads=DERIVED, head_dim=DERIVED),
    block=Block(
        norm=LayerNorm(eps=Key("layer_norm_eps", 1e-5)),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS),
        position=Rope(theta=Key(_THETA, 10000.0), share=Key(_SHARE, 0.25)),
        mlp=PlainMLP(Key("hidden_act", "gelu")),
        residual=Computed(lambda config: Parallel() if lookup(_IS_PARALLEL, config) else PreNorm()),
    ),
    # The class has keys of its own for the first two; some releases of transformers write both.
    fixed={
        "rope_theta": Key(_THETA, 10000.0),
        "partial_rotary_factor": Key(_SHARE, 0.25),
        "head_dim": HIDDEN_PER_HEAD,
    },
    names=Names(
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        block="gpt_neox.layers.{i}.",
        slots=megatron("attention"),
        ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
        in_memory={"embed_out": "lm_head"},  # since transformers 5
    ),
    gguf=GgufFamily(
        "gptneox",
        slots={"attn.qkv": QKV},
        keys={"rope.freq_base": "rotary_emb_base", "use_parallel_residual": "use_parallel_residual"},
        read=lambda metadata: {"rotary_pct": rotary_share(metadata)},
        write=lambda model, config: {"use_parallel_residual": bool(lookup(_IS_PARALLEL, config))},
        config={"hidden_act": "gelu"},
        noted=("hidden_act",),
        has_own_head=True,
    ),
    tiny=_TINY,
    variants={
        "redpajama": {"use_parallel_residual": False, "rotary_pct": 1.0},
        "20b": {"hidden_act": "gelu_fast", "rotary_emb_base": 20000},
        "2.8b": {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 320},  # rotates 20 of 80 dims
        "no-bias": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
        "rope-parameters": {
            "rotary_pct": None,
            "rotary_emb_base": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
        "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    },
)
