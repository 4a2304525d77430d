"""Mistral 4 (text): DeepSeek-V3's layers with a router by softmax, and queries that grow with their positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Router
from llmkit.architecture.gguf import Metadata
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, PerLayer, Rope
from llmkit.architecture.model import Model
from llmkit.architecture.names import Stacked
from llmkit.architecture.scaling import Yarn

from . import latent
from .deepseek2 import NAMES, NOT_COMPUTED, TINY, YARN, mlp_of
from .deepseek3 import ARCHITECTURE as V3
from .deepseek3 import ROUTER
from .deepseek_gguf import GGUF, of_v3, read, refuses, write
from .ministral import GROWTH

_ROUTER: Router = replace(
    ROUTER,
    count=Key("n_routed_experts", 128),
    top_k=Key("num_experts_per_tok", 4),
    scores="softmax",
    scale=Key("routed_scaling_factor", 1.0),
    correction=False,
    groups=Key("n_group", 1),
    top_groups=Key("topk_group", 1),
    is_single=False,
)
_SLOTS = NAMES.without("mlp.experts")
_STACKED = {
    "mlp.experts.gate_up": Stacked("mlp.experts.gate_up_proj", ("gate", "up")),
    "mlp.experts.down": Stacked("mlp.experts.down_proj", ("down",)),
}


def _block(config: Mapping[str, Any], i: int) -> Block:
    block = latent.block(config, mlp_of(config, i, _ROUTER, n_dense=0))
    return replace(block, position=Rope(pairs=latent.pairs(config), growth=GROWTH))


def _read(metadata: Metadata) -> dict[str, Any]:
    config = read(metadata, takes_both=False)
    beta = round(metadata.get("attention.temperature_scale", 0.0), 6)
    return config | {"rope_scaling": {**config.get("rope_scaling", {}), "llama_4_scaling_beta": beta}}


def _write(model: Model, _: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(model.block, Block)  # noqa: S101
    rope: Any = model.block.position
    growth = {"attention.temperature_scale": rope.growth.beta, "attention.temperature_length": rope.growth.length}
    return {**write(model, takes_both=False), **growth}


def _refuses(model: Model) -> str | None:
    position = model.block.position if isinstance(model.block, Block) else None
    if not isinstance(position, Rope) or not isinstance(position.bound_scaling, Yarn):
        return "its positions are not YaRN's"
    return refuses(model)


ARCHITECTURE = replace(
    V3,
    name="mistral4",
    releases=("Mistral Small 4",),
    matches=("Mistral4ForCausalLM",),
    model_types=("mistral4",),
    dims=latent.dims({"expert_ffn": Key("moe_intermediate_size", 2048)}, nope=64, kv_rank=256, q_rank=1024),
    block=PerLayer(_block),
    names=replace(NAMES, slots={**_SLOTS, **_STACKED}),
    fixed={  # transformers makes its rotary positions of `head_dim`
        **latent.ONE_KEY_EACH,
        "head_dim": Computed(lambda config: config.get("qk_nope_head_dim", 64) + config.get("qk_rope_head_dim", 64)),
    },
    gguf=of_v3(GGUF, arch="mistral4", read=_read, write=_write, refuses=_refuses, claims=None),
    unused=(*NOT_COMPUTED, "rope_*.partial_rotary_factor", "rope_*.max_position_embeddings"),
    tiny={
        **TINY, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "rope_theta": None,
        "rope_parameters": {**YARN["rope_parameters"], "llama_4_scaling_beta": 0.1},
    },
    variants={
        "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "rope_interleave": False},
    },
)  # fmt: skip
