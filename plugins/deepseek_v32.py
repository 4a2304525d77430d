"""DeepSeek-V3.2: V3 whose attention sees the tokens that a light indexer chooses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.indexer import IndexedAttention, index_sizes
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, PerLayer, RMSNorm, Rope

from . import latent
from .deepseek2 import NAMES, NOT_COMPUTED, mlp_of
from .deepseek3 import ARCHITECTURE as V3
from .deepseek3 import ROUTER
from .indexer_gguf import GGUF

INDEXER = {
    "attn.index_q": "self_attn.indexer.wq_b",
    "attn.index_k": "self_attn.indexer.wk",
    "attn.index_k_norm": "self_attn.indexer.k_norm",
    "attn.index_weights": "self_attn.indexer.weights_proj",
}


def attention(**changes: Any) -> IndexedAttention:
    """Attention to what the indexer chooses."""
    return IndexedAttention(bias=Key("attention_bias", False), top_k=Key("index_topk", 2048), **changes)


def _block(config: Mapping[str, Any], i: int) -> Block:
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=attention(has_halves=True),
        position=Rope(pairs="interleaved"),
        mlp=mlp_of(config, i, ROUTER, n_dense=3),
    )


TINY: dict[str, Any] = {
    **V3.tiny,
    "kv_lora_rank": 12,
    "index_topk": 2048,
    "index_n_heads": 16,
    "index_head_dim": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "chosen": {"index_topk": 5, "index_head_dim": 4, "attention_bias": True, "mlp_layer_types": ["sparse", "dense"]},
    "yarn": {**V3.variants["yarn"], "index_topk": 7},
}

ARCHITECTURE = replace(
    V3,
    name="deepseek_v32",
    releases=("DeepSeek-V3.2", "DeepSeek-V3.2-Exp"),
    matches=("DeepseekV32ForCausalLM",),
    model_types=("deepseek_v32",),
    dims=latent.dims({"expert_ffn": Key("moe_intermediate_size", 2048), **index_sizes(heads=64)}),
    block=PerLayer(_block),
    names=replace(NAMES, slots={**NAMES.slots, **INDEXER}, ignored=(*NAMES.ignored, "model.layers.61.*")),
    gguf=GGUF,
    unused=(*NOT_COMPUTED, "first_k_dense_replace", "layer_types"),
    tiny={**TINY, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"},
    variants=VARIANTS,
)
