"""Apertus: norms on each head of queries and keys, and an MLP without gate whose activation is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.hooks import TensorFunction, Weights
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kind import Kind, SlotShape, linear_slots
from llmkit.architecture.kinds import Block, GroupedQuery, PlainMLP, RMSNorm, Rope
from llmkit.architecture.positions import THETA_KEYS
from llmkit.architecture.scaling import Llama3Scaling
from llmkit.lazy_imports import torch

from .llama import DIMS, LLAMA_3, QK_NORMS, TINY
from .llama import NAMES as LLAMA_NAMES

if TYPE_CHECKING:
    from llmkit.onnx.graph import Value
    from llmkit.onnx.weights import GraphWeights

_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-5))
_BIAS = Key("attention_bias", False)


@dataclass(frozen=True)
class XieluMLP(Kind):
    """down(xielu(up(x))) (Huang & Schlag 2024, arXiv:2411.13010).

    With p = softplus(alpha_p) and n = beta + softplus(alpha_n):
    xielu(x) = p x^2 + beta x for x > 0, n (exp(min(x, eps)) - 1 - x) + beta x for the others.
    """

    def slots(self) -> dict[str, SlotShape]:
        slots = {**linear_slots("up", "ffn", "hidden", False), **linear_slots("down", "hidden", "ffn", False)}
        slots |= {f"act.alpha_{sign}": SlotShape(("1",), "parameter") for sign in "pn"}
        return slots | {f"act.{constant}": SlotShape((), "parameter") for constant in ("beta", "eps")}

    def torch_reader(self, weights: Weights) -> TensorFunction:
        """The MLP of the torch decoder."""
        from torch.nn.functional import softplus

        from llmkit.decoder.linear import linear

        up, down = linear(weights, "up"), linear(weights, "down")
        beta, eps = weights("act.beta"), weights("act.eps")
        above, below = softplus(weights("act.alpha_p")), beta + softplus(weights("act.alpha_n"))

        def mlp(x: torch.Tensor) -> torch.Tensor:
            x = up(x)
            curved = torch.where(x > 0, above * x * x, below * (torch.expm1(torch.minimum(x, eps)) - x))
            return down(curved + beta * x)

        return mlp

    def onnx_emitter(self, weights: GraphWeights, x: Value) -> Value:
        """The same in a graph."""
        g, one = weights.graph, weights.number(1.0)
        beta, eps = weights.value("act.beta"), weights.value("act.eps")
        x = weights.linear(x, "up")
        above = g.op("Softplus", weights.value("act.alpha_p"))
        below = g.op("Add", g.op("Softplus", weights.value("act.alpha_n")), beta)
        minus = g.op("Sub", g.op("Sub", g.op("Exp", g.op("Min", x, eps)), one), x)
        plus = g.op("Mul", g.op("Mul", x, x), above)
        curved = g.op("Where", g.op("Greater", x, weights.number(0.0)), plus, g.op("Mul", minus, below))
        return weights.linear(g.op("Add", curved, g.op("Mul", x, beta)), "down")


def _rope(config: Mapping[str, Any]) -> Rope:
    """Llama 3.1's scaling where the config states nothing."""
    theta = Key(THETA_KEYS, 12000000.0)
    is_stated = any(config.get(key) for key in ("rope_scaling", "rope_parameters"))
    return Rope(theta=theta) if is_stated else Rope(theta=theta, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))


def _mlp(config: Mapping[str, Any]) -> Kind:
    act = config.get("hidden_act") or "xielu"
    return XieluMLP() if act == "xielu" else PlainMLP(act, bias=False)


def _read(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    is_scaled = "rope_freqs.weight" in names or metadata.get("rope.scaling.type", "none") != "none"
    return {} if is_scaled else {"rope_scaling": {"rope_type": "default"}}


_TINY = {
    **TINY, "hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_theta": 12000000.0, "rope_scaling": LLAMA_3,
    "pad_token_id": 3,
}  # fmt: skip

_SLOTS = {"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm", "mlp.act": "mlp.act_fn"}
ARCHITECTURE = Architecture(
    name="apertus",
    releases=("Apertus-8B", "Apertus-70B"),
    matches=("ApertusForCausalLM",),
    model_types=("apertus",),
    dims=DIMS,
    block=Block(
        norm=_NORM,
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=replace(_NORM, width="head_dim")),
        position=Computed(_rope),
        mlp=Computed(_mlp),
    ),
    unused=("post_norm", "qk_norm"),
    names=replace(
        LLAMA_NAMES,
        slots=LLAMA_NAMES.without("mlp.gate") | QK_NORMS | _SLOTS,
    ),
    gguf=GgufFamily(
        "apertus",
        slots={"mlp.act": "xielu"},
        in_metadata={f"xielu.{leaf}": f"xielu.{leaf}" for leaf in ("alpha_p", "alpha_n", "beta", "eps")},
        config={"hidden_act": "xielu"},
        flags={"attention_bias": "blk.0.attn_q.bias"},
        read_names=_read,
        has_own_head=True,
    ),
    tiny=_TINY,
    variants={"defaults": {"rope_theta": None, "rope_scaling": None, "attention_bias": True}},
)
