"""RWKV-5 (Eagle) and RWKV-6 (Finch): a recurrence whose state is a matrix for each head (arXiv:2404.05892).

Names and config are those of the code that comes with the models for transformers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import NOT_IN_GGUF, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Embedding, LayerNorm, PerLayer
from llmkit.architecture.prompts import FORMATS

from . import ARCHITECTURE as RWKV_4
from . import norm_of
from .heads import heads_as_wide_as
from .v5_kind import Eagle, Finch
from .v6_gguf import GGUF

_HEAD = Key("head_size", 64)
_HEADS = heads_as_wide_as("head_size")


def _ffn(config: Mapping[str, Any]) -> int:
    return int(config.get("intermediate_size") or int(config["hidden_size"] * 3.5) // 32 * 32)


def _head_norm(config: Mapping[str, Any]) -> LayerNorm:
    return LayerNorm(eps=1e-5 * float(config.get("head_size_divisor") or 8) ** 2)


def _rank(name: str, usual: int) -> Computed:
    """Of a low-rank product: as stated, or the published models', of which the widest has twice as many."""
    return Computed(lambda config: config.get(name) or usual * (2 if config["hidden_size"] == 4096 else 1))


_MATRICES = {
    "attn_norm": "ln1", "mlp_norm": "ln2", "attn.head_norm": "attention.ln_x", "attn.first": "attention.time_faaaa",
    "attn.decay": "attention.time_decay", "attn.r": "attention.receptance", "attn.k": "attention.key",
    "attn.v": "attention.value", "attn.g": "attention.gate", "attn.o": "attention.output",
    **{f"mlp.{name}": f"feed_forward.{name}" for name in ("key", "value", "receptance")},
}  # fmt: skip
_LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
_TINY = {"head_size": 8, "attention_hidden_size": 32, "intermediate_size": 96, "layer_norm_epsilon": 1e-5,
         "rescale_every": 2, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip

RWKV_5 = replace(
    RWKV_4,
    name="rwkv5",
    releases=("RWKV-5 World v2 (Eagle)",),
    matches=("Rwkv5ForCausalLM",),
    model_types=("rwkv5",),
    dims=Dims(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads=_HEADS,
        kv_heads=_HEADS,
        head_dim=_HEAD,
        ffn=Computed(_ffn),
        vocab="vocab_size",
        context=Key("context_length", None),
    ),
    embedding=Embedding(norm=Computed(lambda config: norm_of(config, 0))),
    block=PerLayer(lambda config, i: Eagle(norm_of(config, i), _head_norm(config))),
    fixed={**RWKV_4.fixed, "model_version": "5_2"},
    unused=(*RWKV_4.unused, "num_attention_heads"),
    names=replace(
        RWKV_4.names,
        slots={
            **_MATRICES,
            **{f"attn.mix_{short}": f"attention.time_mix_{long}" for short, long in _LONG.items()},
            **{f"mlp.mix_{short}": f"feed_forward.time_mix_{_LONG[short]}" for short in ("k", "r")},
        },
    ),
    prompt=FORMATS["rwkv-world"],
    no_gguf=NOT_IN_GGUF,
    tiny=_TINY,
    variants={"defaults": {"intermediate_size": None, "num_hidden_layers": 3, "rescale_every": 0}},
)
RWKV_6 = replace(
    RWKV_5,
    name="rwkv6",
    releases=("RWKV-6 World (Finch)",),
    matches=("Rwkv6ForCausalLM",),
    model_types=("rwkv6",),
    dims=replace(
        RWKV_5.dims,
        extra={
            "mix_rank": _rank("time_mix_extra_dim", 32),
            "w_rank": _rank("time_decay_extra_dim", 64),
            "rescale_every": Computed(lambda config: config.get("rescale_every") or None),
        },
    ),
    block=PerLayer(lambda config, i: Finch(norm_of(config, i), _head_norm(config))),
    fixed=RWKV_4.fixed,
    unused=(*RWKV_5.unused, "model_version"),
    names=replace(
        RWKV_4.names,
        slots={
            **_MATRICES,
            **{f"attn.mix_{name}": f"attention.time_maa_{name}" for name in ("x", *Finch.mixed)},
            **{f"mlp.mix_{name}": f"feed_forward.time_maa_{name}" for name in ("k", "r")},
            "attn.mix_down": "attention.time_maa_w1",
            "attn.mix_up": "attention.time_maa_w2",
            "attn.decay_down": "attention.time_decay_w1",
            "attn.decay_up": "attention.time_decay_w2",
        },
    ),
    gguf=GGUF,
    tiny={**_TINY, "time_mix_extra_dim": 4, "time_decay_extra_dim": 6},
    variants={**RWKV_5.variants, "rescaled": {"rescale_every": 1}},
)
