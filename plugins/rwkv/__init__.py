"""RWKV-4: no attention, but a recurrence over the tokens (Peng et al. 2023, arXiv:2305.13048).

Halving activations every `rescale_every` layers, a trick for float16 that transformers applies to every dtype, only
makes the eps of later norms larger: that is all of it here.
"""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Embedding, Head, LayerNorm, PerLayer
from llmkit.architecture.names import Names
from llmkit.architecture.prompts import FORMATS
from llmkit.architecture.tokenizers import ByteTrieFile

from .kind import TimeAndChannelMix


def norm_of(config: Mapping[str, Any], layer: int, eps: float | None = None) -> LayerNorm:
    """norm(x / 2^n; eps) = norm(x; 4^n eps). The last norm has torch's own eps, whatever the config says."""
    every = int(config.get("rescale_every") or 0)
    stated = float(config.get("layer_norm_epsilon", 1e-5)) if eps is None else eps
    return LayerNorm(eps=stated * 4 ** (layer // every if every else 0))


def _ffn(config: Mapping[str, Any]) -> Any:
    return config.get("intermediate_size") or 4 * int(config["hidden_size"])


WORLD_VOCAB = 65536
# ChatRWKV, tokenizer/rwkv_tokenizer.py.
TOKENIZER = ByteTrieFile(
    file="rwkv_vocab_v20230424.txt",
    classes=("RWKVWorldTokenizer", "RwkvTokenizer", "Rwkv5Tokenizer", "Rwkv6Tokenizer"),
    end="<|endoftext|>",
    eos="<|endoftext|>",
    pad="<|endoftext|>",
)

ARCHITECTURE = Architecture(
    name="rwkv",
    releases=("RWKV-4 Pile", "RWKV-4 Raven", "RWKV-4 World"),
    matches=("RwkvForCausalLM",),
    model_types=("rwkv",),
    dims=Dims(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads=Key((), 1),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(_ffn),
        vocab="vocab_size",
        context=Key("context_length", None),
    ),
    embedding=Embedding(norm=Computed(lambda config: norm_of(config, 0))),
    block=PerLayer(lambda config, i: TimeAndChannelMix(norm_of(config, i))),
    final_norm=Computed(lambda config: norm_of(config, int(config["num_hidden_layers"]), 1e-5)),
    unused=("is_causal",),
    fixed={"attention_hidden_size": Key("hidden_size")},  # another runs in transformers, without its cache
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
    prompt=Computed(lambda config: FORMATS["rwkv-world" if config.get("vocab_size") == WORLD_VOCAB else "rwkv-raven"]),
    tokenizer=TOKENIZER,
    tiny={
        "attention_hidden_size": 32,
        "intermediate_size": 128,
        "context_length": 64,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    variants={"rescaled": {"num_hidden_layers": 3, "rescale_every": 2}, "defaults": {"intermediate_size": None}},
)
