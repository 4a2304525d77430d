"""Hunyuan with experts (A13B): Hunyuan's attention, and a shared expert beside the chosen ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.kinds import Block, PerLayer
from llmkit.architecture.names import linears
from llmkit.errors import SpecError

from .hunyuan import ARCHITECTURE as DENSE
from .hunyuan import ATTENTION, NAMES, NORM, POSITION
from .llama import DIMS


def _of_layer(config: Mapping[str, Any], i: int, *names: str) -> Any:
    """A value that configs state once, or for each layer."""
    value = lookup(Key(names, 1), config)
    if isinstance(value, list) and len(value) <= i:
        raise SpecError(f"config.json: {names[0]} has {len(value)} entries, expected one for each layer")
    return value[i] if isinstance(value, list) else value


def _block(config: Mapping[str, Any], i: int) -> Block:
    router = Router(
        count=_of_layer(config, i, "num_experts", "num_local_experts"),
        top_k=_of_layer(config, i, "num_experts_per_tok", "moe_topk"),
        is_normalized=True,
        is_single=True,
    )
    mlp = Experts(Key("hidden_act", "silu"), router=router, width="ffn", shared="ffn")
    return Block(norm=NORM, attention=ATTENTION, position=POSITION, mlp=mlp)


ARCHITECTURE = Architecture(
    name="hunyuan_moe",
    releases=("Hunyuan-A13B",),
    matches=("HunYuanMoEV1ForCausalLM",),
    model_types=("hunyuan_v1_moe",),
    dims=DIMS,
    block=PerLayer(_block),
    names=replace(
        NAMES,
        slots={
            **NAMES.without("mlp"),
            "mlp.router": "mlp.gate.wg",
            **linears("mlp.experts.{e}", "mlp.experts.{e}"),
            **linears("mlp.shared", "mlp.shared_mlp"),
        },
    ),
    gguf=GgufFamily(
        "hunyuan-moe",
        keys={
            "expert_used_count": "moe_topk",
            "expert_feed_forward_length": "",
            "expert_shared_feed_forward_length": "",
        },
        config={"hidden_act": "silu"},
    ),
    unused=(
        *DENSE.unused,
        "moe_drop_tokens",
        "moe_random_routing_dropped_token",
        "moe_intermediate_size",
        "num_shared_expert",
        "use_mixed_mlp_moe",
        "moe_layer_num_skipped",
        "output_router_logits",
    ),
    tiny={
        **{key: value for key, value in DENSE.tiny.items() if key not in ("architectures", "model_type")},
        "num_experts": 4,
        "moe_topk": 2,
    },
    variants={
        "plain": {"rope_scaling": None, "moe_topk": [1, 2], "attention_bias": True, "tie_word_embeddings": False}
    },
)
