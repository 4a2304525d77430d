"""GLM-4.7-Flash: DeepSeek-V3's layers in other sizes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Router
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, PerLayer

from . import latent
from .deepseek2 import NAMES, NOT_COMPUTED, TINY, YARN, mlp_of
from .deepseek3 import ARCHITECTURE as V3
from .deepseek3 import ROUTER
from .deepseek_gguf import GGUF_V3, of_v3

_ROUTER: Router = replace(
    ROUTER,
    count=Key("n_routed_experts", 64),
    top_k=Key("num_experts_per_tok", 4),
    scale=Key("routed_scaling_factor", 1.8),
    groups=Key("n_group", 1),
    top_groups=Key("topk_group", 1),
)


def _block(config: Mapping[str, Any], i: int) -> Block:
    return latent.block(config, mlp_of(config, i, _ROUTER, n_dense=1), eps=1e-5)


ARCHITECTURE = replace(
    V3,
    name="glm4_moe_lite",
    releases=("GLM-4.7-Flash",),
    matches=("Glm4MoeLiteForCausalLM",),
    model_types=("glm4_moe_lite",),
    dims=latent.dims({"expert_ffn": Key("moe_intermediate_size", 1536)}, nope=192, q_rank=768, v=256),
    block=PerLayer(_block),
    names=replace(NAMES, ignored=(*NAMES.ignored, "model.layers.47.*")),
    gguf=of_v3(GGUF_V3, noted=(*GGUF_V3.noted, "architectures", "model_type")),  # llama.cpp has one name for both
    unused=(*NOT_COMPUTED, "partial_rotary_factor", "first_k_dense_replace"),
    tiny={
        **TINY, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": True, "first_k_dense_replace": None,
    },
    variants={
        "types": {"mlp_layer_types": ["sparse", "dense"], "n_group": 2, "rope_interleave": False},
        "yarn": YARN,
    },
)  # fmt: skip
