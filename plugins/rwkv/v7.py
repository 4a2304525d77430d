"""RWKV-7: no attention, but a recurrence by a generalised delta rule (Peng et al. 2025, arXiv:2503.14456).

Names and config are those of flash-linear-attention, in which the models are published for transformers.
"""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Embedding, Head, LayerNorm, PerLayer
from llmkit.architecture.names import Names
from llmkit.architecture.prompts import FORMATS

from . import TOKENIZER
from .heads import heads_as_wide_as
from .v7_gguf import GGUF
from .v7_kind import GeneralizedDelta
from .v7_mix import MIXED

_EPS = Key("norm_eps", 1e-5)
_NORM = LayerNorm(eps=_EPS, bias=Key("norm_bias", True))
_HEAD_DIM = Key("head_dim", 64)
_HEADS = heads_as_wide_as("head_dim")


def _ffn(config: Mapping[str, Any]) -> int:
    width = config.get("intermediate_size") or int(config["hidden_size"] * (config.get("hidden_ratio") or 4))
    return width if config.get("intermediate_size") else 32 * -(-width // 32)


def _head_eps(config: Mapping[str, Any]) -> float:
    return float(config.get("head_dim") or 64) * float(config.get("norm_eps") or 1e-5)


ARCHITECTURE = Architecture(
    name="rwkv7",
    releases=("RWKV-7 Goose World", "RWKV-7 G1"),
    matches=("RWKV7ForCausalLM",),
    model_types=("rwkv7",),
    dims=Dims(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads=_HEADS,
        kv_heads=_HEADS,
        head_dim=_HEAD_DIM,
        ffn=Computed(_ffn),
        vocab="vocab_size",
        extra={
            "w_rank": Key("decay_low_rank_dim"),
            "a_rank": Key("a_low_rank_dim"),
            "v_rank": Key("v_low_rank_dim"),
            "g_rank": Key("gate_low_rank_dim"),
        },
    ),
    embedding=Embedding(norm=_NORM),
    block=PerLayer(lambda config, i: GeneralizedDelta(_NORM, LayerNorm(eps=Computed(_head_eps)), is_first=i == 0)),
    final_norm=_NORM,
    fixed={"norm_first": True, "hidden_act": "sqrelu"},
    unused=("attn", "attn_mode", "fuse_*", "use_l2warp", "value_dim", "num_heads", "hidden_ratio"),
    head=Head(tied=Key("tie_word_embeddings", False)),
    names=Names(
        embed="model.embeddings",
        final_norm="model.norm",
        head="lm_head",
        block="model.layers.{i}.",
        outer={"embed_norm": "model.layers.0.pre_norm"},
        slots={
            "attn_norm": "attn_norm",
            "mlp_norm": "ffn_norm",
            **{f"attn.mix_{name}": f"attn.x_{name}" for name in MIXED},
            **{f"attn.{name}": f"attn.{name}" for name in ("k_k", "k_a", "r_k")},
            **{f"attn.{name}": f"attn.{name}_proj" for name in ("r", "k", "v", "o")},
            **{f"attn.{name}_down": f"attn.{name}_lora.lora.0" for name in ("w", "a", "v", "g")},
            **{f"attn.{name}_up": f"attn.{name}_lora.lora.2" for name in ("w", "a", "v", "g")},
            "attn.head_norm": "attn.g_norm",
            "mlp.mix_k": "ffn.x_k",
            "mlp.key": "ffn.key",
            "mlp.value": "ffn.value",
        },
    ),
    prompt=FORMATS["rwkv-world"],
    tokenizer=TOKENIZER,
    gguf=GGUF,
    tiny={
        "hidden_size": 128,
        "head_dim": 64,
        "intermediate_size": 128,
        "decay_low_rank_dim": 8,
        "a_low_rank_dim": 6,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 12,
        "norm_eps": 1e-5,
        "hidden_act": "sqrelu",
        "tie_word_embeddings": False,
    },
)
