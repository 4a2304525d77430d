"""Helium 1 (Kyutai 2025): Llama's layers with rotary pairs side by side."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope
from llmkit.architecture.positions import THETA_KEYS

from .llama import DIMS, NAMES, TINY

ARCHITECTURE = Architecture(
    name="helium",
    releases=("Helium-1-2B",),
    matches=("HeliumForCausalLM",),
    model_types=("helium",),
    dims=replace(DIMS, head_dim=Key("head_dim", 128)),
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-8)),
        attention=GroupedQuery(qkv_bias=Key("attention_bias", False)),
        position=Rope(theta=Key(THETA_KEYS, 100000.0), pairs="interleaved"),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
    ),
    names=NAMES,
    optimum_reads={"helium": ("kv_heads",)},
    tiny={**TINY, "head_dim": 8, "rms_norm_eps": 1e-8, "rope_theta": 100000.0, "pad_token_id": 3},
    variants={"biases": {"attention_bias": True, "mlp_bias": True, "rope_theta": None, "tie_word_embeddings": True}},
)
