"""Baichuan 1 and 2: LLaMA's layers with q, k and v in one matrix; rotary positions in the 7B models, ALiBi in 13B.

Both sizes state the same `architectures`; the published configs tell them apart by `max_position_embeddings`, which
only the 7B models have. Baichuan 2 divides the rows of its head by their norms (NormHead): its configs have a
`z_loss_weight`, and 125,696 tokens. Source: modeling_baichuan.py of the four repositories (baichuan-inc).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Alibi, Head, Rope
from llmkit.architecture.names import Fused
from llmkit.architecture.prompts import FORMATS
from llmkit.architecture.scaling import NoScaling
from llmkit.architecture.tokenizers import SentencePieceFile

from .llama import BLOCK
from .llama import NAMES as LLAMA_NAMES
from .llama_alikes import as_llama

BAICHUAN_2_VOCAB = 125696
_CONTEXT_13B = 4096  # of both releases, whose configs may leave it to the tokenizer's
_LAYOUT = "Meta AI original pth"


def has_norm_head(config: Mapping[str, Any]) -> bool:
    """True for Baichuan 2."""
    return config.get("vocab_size") == BAICHUAN_2_VOCAB or "z_loss_weight" in config


def is_rotary(config: Mapping[str, Any]) -> bool:
    """True for the 7B models."""
    return config.get("max_position_embeddings") is not None


def _as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False}
    heads = {"num_key_value_heads": config["num_attention_heads"]}
    return as_llama(config, "z_loss_weight", "_from_model_config", **heads, **fixed)


# tokenization_baichuan.py of both releases; the reserved tokens are the roles of the chat models.
TOKENIZER = SentencePieceFile(
    file="tokenizer.model",
    classes=("BaichuanTokenizer", "BaiChuanTokenizer"),
    reserved=("<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>"),
    bos="<s>",
    eos="</s>",
    unk="<unk>",
    adds_bos=True,
    adds_eos=False,
)

_BLOCK = replace(BLOCK, position=Rope(theta=10000.0, scaling=NoScaling()))
_SLOTS = {"attn.qkv": Fused("self_attn.W_pack", ("q", "k", "v")), **LLAMA_NAMES.without("attn.q", "attn.k", "attn.v")}
_GGUF = GgufFamily("baichuan", pairs="interleaved", write=lambda *_: {"tensor_data_layout": _LAYOUT}, has_own_head=True)

BAICHUAN_7B = Architecture(
    name="baichuan",
    releases=("Baichuan-7B", "Baichuan2-7B"),
    matches=("BaichuanForCausalLM",),  # upper and lower case do not matter: BaiChuanForCausalLM is the 7B model's
    model_types=("baichuan",),
    when=is_rotary,
    dims=Dims(context=Key(("max_position_embeddings", "model_max_length"), None)),
    equivalents={"llama": _as_llama},
    block=_BLOCK,
    head=Head(tied=Key("tie_word_embeddings", False), normalized=Computed(has_norm_head)),
    prompt=Computed(lambda config: FORMATS["baichuan2-chat" if has_norm_head(config) else "baichuan-chat"]),
    tokenizer=TOKENIZER,
    names=replace(LLAMA_NAMES, slots=_SLOTS),
    gguf=_GGUF,
    tiny={
        "architectures": ["BaiChuanForCausalLM"],
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    variants={"baichuan2-7b": {"architectures": ["BaichuanForCausalLM"], "model_max_length": 64, "z_loss_weight": 0}},
)

BAICHUAN_13B = replace(
    BAICHUAN_7B,
    name="baichuan13b",
    releases=("Baichuan-13B", "Baichuan2-13B"),
    when=lambda config: not is_rotary(config),
    equivalents={},
    described_as=lambda config: (
        _as_llama(config) | {"max_position_embeddings": config.get("model_max_length", _CONTEXT_13B)}
    ),
    block=replace(_BLOCK, position=Alibi()),
    gguf=replace(
        _GGUF,
        keys={"context_length": "model_max_length"},
        claims=lambda metadata, _: "attention.max_alibi_bias" in metadata or metadata.get("block_count") == 40,
        has_pairs_without_rope=True,
    ),
    tiny={
        **{k: v for k, v in BAICHUAN_7B.tiny.items() if k != "max_position_embeddings"},
        "architectures": ["BaichuanForCausalLM"],
        "hidden_size": 40,
        "num_attention_heads": 5,  # no power of two, as the 40 heads of the real model
        "model_max_length": 64,
    },
    variants={"baichuan2-13b": {"z_loss_weight": 0}, "power of two": {"num_attention_heads": 4}},
)
