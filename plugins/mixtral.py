"""Mixtral 8x7B and 8x22B: Mistral's attention, and two of eight experts for each token."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GroupedQuery, RMSNorm, Rope
from llmkit.architecture.layer_types import window_of
from llmkit.architecture.positions import THETA_KEYS

from .llama import DIMS, NAMES, TINY

ARCHITECTURE = Architecture(
    name="mixtral",
    releases=("Mixtral 8x7B", "Mixtral 8x22B"),
    matches=("MixtralForCausalLM",),
    model_types=("mixtral",),
    dims=DIMS,
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(window=Computed(lambda config: window_of(config, None))),
        position=Rope(theta=Key(THETA_KEYS, 1000000.0)),
        mlp=Experts(
            Key("hidden_act", "silu"),
            router=Router(
                count=Key(("num_local_experts", "num_experts"), 8),
                top_k=Key("num_experts_per_tok", 2),
                is_normalized=True,
            ),
            width="ffn",
        ),
    ),
    names=replace(
        NAMES,
        slots={
            **NAMES.without("mlp"),
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts.{e}.gate": "block_sparse_moe.experts.{e}.w1",
            "mlp.experts.{e}.up": "block_sparse_moe.experts.{e}.w3",
            "mlp.experts.{e}.down": "block_sparse_moe.experts.{e}.w2",
        },
        respelled={".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},  # llm-compressor 0.14
        in_memory={"block_sparse_moe.gate": "mlp.gate"},  # since transformers 5
    ),
    gguf=GgufFamily(  # as Llama's files, with experts
        "llama",
        pairs="interleaved",
        config={"hidden_act": "silu"},
        keys={"expert_count": "num_local_experts", "expert_feed_forward_length": ""},
        write=lambda model, _: {"expert_feed_forward_length": None},
    ),
    unused=("router_jitter_noise", "output_router_logits"),
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    variants={
        "one-expert": {"num_experts_per_tok": 1, "head_dim": 16},
        "window": {"sliding_window": 7, "tie_word_embeddings": True},
    },
)
