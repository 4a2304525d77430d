"""OLMo 1 (Groeneveld et al. 2024, arXiv:2402.00838): Llama's layers with norms that have no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.hooks import TensorFunction, Weights
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, Kind, Rope
from llmkit.architecture.model import Model
from llmkit.lazy_imports import np, torch

from .llama import DIMS, GGUF, NAMES, TINY

if TYPE_CHECKING:
    from llmkit.onnx.graph import Value
    from llmkit.onnx.weights import GraphWeights

_BIAS = Key("attention_bias", False)
_EPS = 1e-5


@dataclass(frozen=True)
class WeightlessNorm(Kind):
    """(x - mean) / sqrt(var + 1e-5), in float32: LayerNorm with nothing learned."""

    def torch_reader(self, weights: Weights) -> TensorFunction:
        """The norm of the torch decoder."""

        def norm(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=_EPS).to(x.dtype)

        return norm

    def onnx_emitter(self, weights: GraphWeights, x: Value) -> Value:
        """The same in a graph."""
        g = weights.graph
        ones = weights.computed(g.constant(np.ones(weights.model.dims.hidden, dtype=np.float32)))
        normed: Value = g.op("LayerNormalization", x, ones, axis=-1, epsilon=_EPS)
        return normed


def _metadata(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": _EPS, "attention.clamp_kqv": config.get("clip_qkv")}


ARCHITECTURE = Architecture(
    name="olmo",
    releases=("OLMo-1B", "OLMo-7B", "OLMo-7B-0724"),
    matches=("OlmoForCausalLM",),
    model_types=("olmo",),
    dims=DIMS,
    block=Block(
        norm=WeightlessNorm(),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, clip=Key("clip_qkv", None)),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
    ),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=NAMES,
    gguf=GgufFamily(
        "olmo",
        pairs=GGUF.pairs,
        keys={"attention.clamp_kqv": "clip_qkv", "attention.layer_norm_epsilon": ""},
        config={"hidden_act": "silu"},
        write=_metadata,
    ),
    tiny={**TINY, "clip_qkv": 0.5, "pad_token_id": 1, "num_key_value_heads": 4},
    variants={"1b": {"clip_qkv": None, "tie_word_embeddings": True}, "grouped": {"num_key_value_heads": 2}},
)
