"""Phi-3.5-MoE: two experts for each token, the second chosen as if the first were not there (SparseMixer)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import ExpertChoice, Experts
from llmkit.architecture.keys import Computed, Key, Number, as_float
from llmkit.architecture.kinds import Block, GroupedQuery, Head, LayerNorm, Rope
from llmkit.architecture.layer_types import window_of
from llmkit.architecture.positions import THETA_KEYS
from llmkit.architecture.scaling import Scaling, scaling_of
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch

from .llama import DIMS, TINY
from .mixtral import ARCHITECTURE as MIXTRAL

if TYPE_CHECKING:
    from llmkit.architecture.hooks import Weights
    from llmkit.onnx.weights import GraphWeights

_BIAS = Key("attention_bias", False)


@dataclass(frozen=True)
class SparseMixer(ExpertChoice):
    """The best expert, weighed by a softmax over those near it; then the same among the others (arXiv:2409.12136).

    Near is an expert whose logit lies within 2 * jitter of the best one's, relative to the larger of that and its own
    absolute value.

    Attributes:
        jitter: half that distance.
    """

    jitter: Number

    def torch_reader(self, weights: Weights) -> Any:
        """As of `RouterHooks`."""
        matrix, reach = weights("weight"), 2 * as_float(self.jitter)

        def best(logits: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            most, chosen = others.max(-1, keepdim=True)
            is_far = (most - logits) / logits.abs().clamp(min=most) > reach
            return chosen, others.masked_fill(is_far, float("-inf")).softmax(-1).gather(-1, chosen)

        def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = torch.nn.functional.linear(x, matrix)
            first, share = best(logits, logits)
            second, other = best(logits, logits.scatter(-1, first, float("-inf")))
            return torch.cat([first, second], -1), torch.cat([share, other], -1)

        return route

    def onnx_emitter(self, weights: GraphWeights, x: Any) -> Any:
        """As of `RouterHooks`."""
        g = weights.graph
        logits = weights.single(weights.linear(x, "router"))
        reach, none = g.number(2 * as_float(self.jitter)), g.number(float("-inf"))

        def best(others: Any) -> tuple[Any, Any]:
            most, chosen = g.op("TopK", others, g.ints(1), n=2, axis=-1)
            distance = g.op("Div", g.op("Sub", most, logits), g.op("Max", g.op("Abs", logits), most))
            near = g.op("Where", g.op("Greater", distance, reach), none, others)
            return chosen, g.op("GatherElements", g.op("Softmax", near, axis=-1), chosen, axis=-1)

        first, share = best(logits)
        hidden = g.op("Expand", none, g.op("Shape", first))
        second, other = best(g.op("ScatterElements", logits, first, hidden, axis=-1))
        return g.op("Concat", first, second, axis=-1), g.op("Concat", share, other, axis=-1)


def _scaling(config: Mapping[str, Any]) -> Scaling:
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    short, long = params.get("short_mscale"), params.get("long_mscale")
    if short != long:
        raise RequirementError(f"rotary positions with short_mscale {short} and long_mscale {long}: expected the same")
    return scaling_of(params if short is None else ChainMap({"attention_factor": short}, params), config)


_TINY = {
    **TINY, "num_local_experts": 5, "router_jitter_noise": 0.3, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "attention_bias": True, "lm_head_bias": True, "eos_token_id": 2,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="phimoe",
    releases=("Phi-3.5-MoE",),
    matches=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    model_types=("phimoe",),
    dims=DIMS,
    block=Block(
        norm=LayerNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, window=Computed(lambda config: window_of(config, None))),
        position=Rope(theta=Key(THETA_KEYS, 1000000.0), scaling=Computed(_scaling)),
        mlp=Experts(
            Key("hidden_act", "silu"),
            router=SparseMixer(
                Key(("num_local_experts", "num_experts"), 16), top_k=2, jitter=Key("router_jitter_noise", 0.01)
            ),
            width="ffn",
        ),
    ),
    head=Head(tied=Key("tie_word_embeddings", False), bias=Key("lm_head_bias", False)),
    names=replace(MIXTRAL.names, in_memory={"block_sparse_moe.gate": "mlp.router"}),  # since transformers 5
    no_gguf="llama.cpp weighs its experts by a plain softmax, and has RMSNorm where it has LayerNorm",
    unused=(
        "router_aux_loss_coef", "output_router_logits", "input_jitter_noise", "rope_*.*_mscale",
        "use_sliding_window",  # a window that is stated counts; transformers 4.57's masks alone look at this key
    ),
    fixed={"num_experts_per_tok": 2},
    tiny=_TINY,
    variants={
        "long": {
            "rope_scaling": {
                "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
                "short_mscale": 1.25, "long_mscale": 1.25, "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings": 32, "sliding_window": 7, "router_jitter_noise": None,
        }
    },
)  # fmt: skip
