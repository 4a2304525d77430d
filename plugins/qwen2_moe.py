"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2's attention, many small experts, and one that every token goes through."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Kind, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.names import linears
from llmkit.errors import SpecError

from .llama import DIMS, NAMES, TINY
from .qwen2 import WINDOW_KEYS

ACT = Key("hidden_act", "silu")
# One by one, as transformers writes them whatever its own modules look like.
EXPERTS = {"mlp.router": "mlp.gate", **linears("mlp.experts.{e}", "mlp.experts.{e}")}


def mlp_of(config: Mapping[str, Any], i: int, experts: Experts) -> Kind:
    """The experts, or the dense MLP of the layers that `mlp_only_layers` and `decoder_sparse_step` leave out.

    Raises:
        SpecError: they are no list of layers, and no step.
    """
    step, only = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(step, int) or step < 1 or not isinstance(only, list):
        raise SpecError(f"config.json: decoder_sparse_step is {step!r} and mlp_only_layers {only!r}")
    return GatedMLP(experts.act) if i in only or (i + 1) % step else experts


def _window(config: Mapping[str, Any], i: int) -> int | None:
    if not config.get("use_sliding_window"):
        return None
    # transformers 5's rule; 4.57 has the upper layers in its place. No published model has a window.
    is_windowed = is_sliding(config, i, lambda i: i % 2 == 0 and i < config.get("max_window_layers", 28))
    return window_of(config, 4096) if is_windowed else None


def _block(config: Mapping[str, Any], i: int) -> Block:
    router = Router(
        count=Key("num_experts", 60), top_k=Key("num_experts_per_tok", 4), is_normalized=Key("norm_topk_prob", False)
    )
    experts = Experts(ACT, router=router, shared="shared_ffn", shared_gate=True)
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=GroupedQuery(qkv_bias=Key("qkv_bias", True), window=_window(config, i)),
        position=Rope(),
        mlp=mlp_of(config, i, experts),
    )


ARCHITECTURE = Architecture(
    name="qwen2_moe",
    releases=("Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B"),
    matches=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    dims=replace(
        DIMS,
        extra={
            "expert_ffn": Key("moe_intermediate_size", 1408),
            "shared_ffn": Key("shared_expert_intermediate_size", 5632),
        },
    ),
    block=PerLayer(_block),
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **EXPERTS,
            **linears("mlp.shared", "mlp.shared_expert"),
            "mlp.shared_gate": "mlp.shared_expert_gate",
        },
    ),
    gguf=GgufFamily("qwen2moe", config={"use_sliding_window": False, "norm_topk_prob": False}, has_own_head=True),
    unused=(*WINDOW_KEYS, "output_router_logits"),
    tiny={
        **TINY,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "eos_token_id": 2,
    },
    variants={
        "dense-above": {"norm_topk_prob": True, "tie_word_embeddings": True, "mlp_only_layers": [1]},
        "no-bias": {"qkv_bias": False},
    },
)
