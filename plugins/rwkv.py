"""RWKV-4: no attention, but a recurrence over the tokens (Peng et al. 2023, arXiv:2305.13048).

State of a layer, [B, 5, hidden] float32: the last token as the channel mix and as the time mix saw it, and numerator,
denominator and largest exponent of the weighted mean. Halving activations every `rescale_every` layers, a trick for
float16 that transformers applies to every dtype, only makes the eps of later norms larger: that is all of it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kind import linear_slots, under
from llmkit.architecture.kinds import Embedding, Head, Kind, LayerNorm, NoPositions, PerLayer, SlotShape
from llmkit.architecture.names import Names

if TYPE_CHECKING:
    import torch


def _norm(config: Mapping[str, Any], layer: int) -> LayerNorm:
    """norm(x / 2^n; eps) = norm(x; 4^n eps)."""
    every = int(config.get("rescale_every") or 0)
    return LayerNorm(eps=float(config.get("layer_norm_epsilon", 1e-5)) * 4 ** (layer // every if every else 0))


@dataclass(frozen=True)
class TimeAndChannelMix(Kind):
    """One layer: x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    norm: Kind
    position: Kind = field(default_factory=NoPositions)

    def slots(self) -> dict[str, SlotShape]:
        slots = under("attn_norm", self.norm) | under("mlp_norm", self.norm)
        mixes = {"attn": ("key", "value", "receptance"), "mlp": ("key", "receptance")}
        for part, names in mixes.items():
            slots |= {f"{part}.mix_{name}": SlotShape(("1", "1", "hidden"), "parameter") for name in names}
        slots |= {f"attn.{name}": SlotShape(("mixed",), "parameter") for name in ("decay", "first")}
        linears = {"attn.k": ("mixed", "hidden"), "attn.v": ("mixed", "hidden"), "attn.r": ("mixed", "hidden"),
                   "attn.o": ("hidden", "mixed"), "mlp.key": ("ffn", "hidden"), "mlp.value": ("hidden", "ffn"),
                   "mlp.receptance": ("hidden", "hidden")}  # fmt: skip
        for name, (out, inside) in linears.items():
            slots |= linear_slots(name, out, inside, False)
        return slots

    @staticmethod
    def torch_reader(kind: TimeAndChannelMix, model: Any, weights: Any, index: int, positions: Any) -> Any:
        """The layer of the torch decoder."""
        return _layer(kind, weights, index)


def _layer(kind: TimeAndChannelMix, weights: Any, index: int) -> Any:
    import torch
    from torch.nn.functional import linear

    from llmkit.decoder.norms import build_norm

    attn, mlp = weights.under("attn"), weights.under("mlp")
    norms = [build_norm(kind.norm, weights.under(name)) for name in ("attn_norm", "mlp_norm")]
    w = {n: attn(f"{n}.weight") for n in ("k", "v", "r", "o")}
    w |= {n: mlp(f"{n}.weight") for n in ("key", "value", "receptance")}
    mixes = {n: attn(f"mix_{n}").view(-1) for n in ("key", "value", "receptance")}
    channel = {n: mlp(f"mix_{n}").view(-1) for n in ("key", "receptance")}
    decay, first = -attn("decay").float().exp(), attn("first").float()

    def run(x: torch.Tensor, state: torch.Tensor | None, real: torch.Tensor | None) -> Any:
        if state is None:
            state = x.new_zeros((x.shape[0], 5, x.shape[2]), dtype=torch.float32)
            state[:, 4] = -1e38
        y = _hidden_only(norms[0](x), real)
        before = _shifted(y, state[:, 1])
        k, v, r = (
            linear(y * mixes[n] + before * (1 - mixes[n]), w[m])
            for n, m in (("key", "k"), ("value", "v"), ("receptance", "r"))
        )
        mean, held = _weighted_mean(k.float(), v.float(), decay, first, state[:, 2:], real)
        x = x + linear(r.sigmoid() * mean.to(x.dtype), w["o"])
        z = _hidden_only(norms[1](x), real)
        before = _shifted(z, state[:, 0])
        key = linear(z * channel["key"] + before * (1 - channel["key"]), w["key"]).relu().square()
        gate = linear(z * channel["receptance"] + before * (1 - channel["receptance"]), w["receptance"]).sigmoid()
        x = x + gate * linear(key, w["value"])
        return x, torch.cat([z[:, -1:].float(), y[:, -1:].float(), held], 1)

    def layer(x: torch.Tensor, table: Any, cache: Any) -> Any:
        return cache.recur(index, run, x)

    return layer


def _hidden_only(y: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Padding is to the next token as if nothing had been before it."""
    return y if real is None else y * real[..., None]


def _shifted(y: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The token before each one; `last` [B, hidden] before the first."""
    import torch

    return torch.cat([last[:, None].to(y.dtype), y[:, :-1]], 1)


def _weighted_mean(
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    first: torch.Tensor,
    state: torch.Tensor,
    real: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of values weighted by exp(key), decaying with distance; token by token, exponents kept below zero."""
    import torch

    above, below, largest = state.unbind(1)
    out = torch.empty_like(k)
    for t in range(k.shape[1]):
        key, value = k[:, t], v[:, t]
        top = torch.maximum(largest, first + key)
        old, new = (largest - top).exp(), (first + key - top).exp()
        out[:, t] = (old * above + new * value) / (old * below + new)
        top = torch.maximum(largest + decay, key)
        old, new = (largest + decay - top).exp(), (key - top).exp()
        after = old * above + new * value, old * below + new, top
        if real is None:
            above, below, largest = after
        else:
            is_real = real[:, t, None]
            held = (above, below, largest)
            above, below, largest = (torch.where(is_real, a, h) for a, h in zip(after, held, strict=True))
    return out, torch.stack([above, below, largest], 1)


def _ffn(config: Mapping[str, Any]) -> Any:
    return config.get("intermediate_size") or 4 * int(config["hidden_size"])


ARCHITECTURE = Architecture(
    name="rwkv",
    matches=("RwkvForCausalLM",),
    model_types=("rwkv",),
    dims=Dims(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads=Key((), 1),
        ffn=Computed(_ffn),
        vocab="vocab_size",
        context=Key("context_length", None),
        extra={"mixed": Computed(lambda c: c.get("attention_hidden_size") or c["hidden_size"])},
    ),
    embedding=Embedding(norm=Computed(lambda config: _norm(config, 0))),
    block=PerLayer(lambda config, i: TimeAndChannelMix(_norm(config, i))),
    final_norm=Computed(lambda config: _norm(config, int(config["num_hidden_layers"]))),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=Names(
        embed="rwkv.embeddings",
        final_norm="rwkv.ln_out",
        head="head",
        block="rwkv.blocks.{i}.",
        outer={"embed_norm": "rwkv.blocks.0.pre_ln"},
        slots={
            "attn_norm": "ln1",
            "mlp_norm": "ln2",
            "attn.mix_key": "attention.time_mix_key",
            "attn.mix_value": "attention.time_mix_value",
            "attn.mix_receptance": "attention.time_mix_receptance",
            "attn.decay": "attention.time_decay",
            "attn.first": "attention.time_first",
            "attn.k": "attention.key",
            "attn.v": "attention.value",
            "attn.r": "attention.receptance",
            "attn.o": "attention.output",
            "mlp.mix_key": "feed_forward.time_mix_key",
            "mlp.mix_receptance": "feed_forward.time_mix_receptance",
            "mlp.key": "feed_forward.key",
            "mlp.value": "feed_forward.value",
            "mlp.receptance": "feed_forward.receptance",
        },
    ),
    tiny={
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": 96,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "context_length": 64,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    variants={"rescaled": {"num_hidden_layers": 3, "rescale_every": 2}, "defaults": {"intermediate_size": None}},
)
