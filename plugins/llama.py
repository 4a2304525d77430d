"""LLaMA 1, 2 and 3, and everything stored in that layout (Alpaca, Vicuna, OpenLLaMA, TinyLlama, SmolLM2, …)."""

from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope
from llmkit.architecture.names import Names
from llmkit.architecture.tokenizers import SentencePieceFile

# Many families spell sizes and tensors as this one does.
DIMS = Dims()
NAMES = Names(
    embed="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    block="model.layers.{i}.",
    slots={
        "attn_norm": "input_layernorm",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
    ignored=("*.rotary_emb.inv_freq",),
)

QK_NORMS = {f"attn.{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
BLOCK = Block(
    norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
    attention=GroupedQuery(),
    position=Rope(),
    mlp=GatedMLP(Key("hidden_act", "silu")),
)
# Llama 3.1's scaling, with the context of a tiny model.
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

# llama.cpp takes rotary pairs as the original LLaMA has them: dim 2j with 2j + 1.
GGUF = GgufFamily(
    "llama",
    pairs="interleaved",
    config={"hidden_act": "silu"},
    flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
)
# Sizes of a tiny model in these keys.
TINY: dict[str, Any] = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# Meta, llama/tokenizer.py; transformers' class of that name before tokenizer.json was published with it.
TOKENIZER = SentencePieceFile(
    file="tokenizer.model",
    classes=("LlamaTokenizer", "LLaMATokenizer", "LlamaTokenizerFast"),
    bos="<s>",
    eos="</s>",
    unk="<unk>",
    adds_bos=True,
    adds_eos=False,
)

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

ARCHITECTURE = Architecture(
    name="llama",
    releases=("LLaMA", "Llama 2", "Llama 3", "Alpaca", "Vicuna", "Koala", "OpenLLaMA", "TinyLlama", "SmolLM2"),
    matches=("LlamaForCausalLM",),
    model_types=("llama",),
    dims=DIMS,
    block=replace(
        BLOCK,
        attention=GroupedQuery(qkv_bias=Key("attention_bias", False), out_bias=Key("attention_bias", False)),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
    ),
    names=NAMES,
    tokenizer=TOKENIZER,
    gguf=GGUF,
    optimum_reads={"llama": ("kv_heads",)},
    tiny={**TINY, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2},
    variants={
        "multi-head": {"num_key_value_heads": 4},
        "multi-query": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "wide-heads": {"head_dim": 16},
        "attention-bias": {"attention_bias": True},
        "mlp-bias": {"mlp_bias": True},
        "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-6},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24},
        "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA_3},
        "yarn": {"rope_scaling": _YARN},
        "yarn-mscale": {
            "rope_scaling": {
                **_YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
                "truncate": False,
            }
        },
        "yarn-attention-factor": {"rope_scaling": {**_YARN, "attention_factor": 1.25}},
    },
)
