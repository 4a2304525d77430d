"""Granite 3 MoE: Granite's multipliers, and experts whose weights are a softmax over the chosen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.names import Entry, Fused, Stacked

from .granite import ARCHITECTURE as GRANITE
from .granite import BLOCK, SCALES, metadata
from .llama import DIMS, NAMES

EXPERTS = Experts(
    Key("hidden_act", "silu"),
    router=Router(
        count=Key(("num_local_experts", "num_experts"), 8),
        top_k=Key("num_experts_per_tok", 2),
        scores="chosen_softmax",
    ),
    width="ffn",
)
_SLOTS = {
    **NAMES.without("mlp"),
    "mlp.router": "block_sparse_moe.router.layer",
    "mlp.experts.gate_up": Stacked("block_sparse_moe.input_linear", ("gate", "up"), weight=".weight"),
    "mlp.experts.down": Stacked("block_sparse_moe.output_linear", ("down",), weight=".weight"),
}
_IN_MEMORY = {"block_sparse_moe.router.layer": "block_sparse_moe.router"}  # since transformers 5
_SHARED: dict[str, Entry] = {
    "mlp.shared.gate_up": Fused("shared_mlp.input_linear", ("gate", "up")),
    "mlp.shared.down": "shared_mlp.output_linear",
}
_TINY = {key: value for key, value in GRANITE.tiny.items() if key not in ("architectures", "model_type")}

_SHARED_WIDTH = Key("shared_intermediate_size", 0)


def _with_shared(config: Mapping[str, Any]) -> Experts:
    return replace(EXPERTS, shared="shared_ffn" if lookup(_SHARED_WIDTH, config) else None)


_GGUF = GgufFamily(
    "granitemoe",
    pairs="interleaved",
    keys={
        **SCALES,
        "expert_count": "num_local_experts",
        "expert_feed_forward_length": "",
        "expert_shared_feed_forward_length": "shared_intermediate_size",
    },
    config={"hidden_act": "silu"},
    flags={"attention_bias": "blk.0.attn_q.bias"},
    write=lambda model, config: {**metadata(model, config), "expert_feed_forward_length": None},
)
GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    releases=("Granite-3.0-1B-A400M", "Granite-3.1-3B-A800M"),
    matches=("GraniteMoeForCausalLM",),
    model_types=("granitemoe",),
    block=replace(BLOCK, mlp=EXPERTS),
    names=replace(NAMES, slots=_SLOTS, in_memory=_IN_MEMORY),
    gguf=_GGUF,
    fixed={"position_embedding_type": "rope"},  # transformers 4 writes it
    unused=("router_aux_loss_coef", "output_router_logits", "mlp_bias"),
    tiny={**_TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    variants={"defaults": GRANITE.variants["defaults"], "biases": {"attention_bias": True, "num_experts_per_tok": 1}},
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    name="granitemoeshared",
    releases=("MoE-7B-A1B with shared experts (IBM Research)",),
    matches=("GraniteMoeSharedForCausalLM",),
    model_types=("granitemoeshared",),
    dims=replace(DIMS, extra={"shared_ffn": Computed(lambda config: lookup(_SHARED_WIDTH, config) or 1)}),
    block=replace(BLOCK, mlp=Computed(_with_shared)),
    names=replace(NAMES, slots={**_SLOTS, **_SHARED}, in_memory=_IN_MEMORY),
    gguf=replace(
        _GGUF,
        write=lambda model, config: {
            **metadata(model, config),
            "expert_feed_forward_length": None,
            "expert_shared_feed_forward_length": lookup(_SHARED_WIDTH, config) or 0,
        },
        claims=lambda metadata, _: "expert_shared_feed_forward_length" in metadata,
    ),
    tiny={**_TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    variants={"unshared": {"shared_intermediate_size": None}},
)
