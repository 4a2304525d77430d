"""ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2 and GLM-4-9B in the layout of their own repositories (model_type chatglm).

LLaMA's layers with rotary positions in interleaved pairs on half of each head. A `rope_ratio` divides positions in
ChatGLM2 and multiplies the base in ChatGLM3 and GLM-4; their configs do not say which they are, apart from the name
of the repository in `_name_or_path`. Source: modeling_chatglm.py of the repositories (THUDM).
"""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Kind, LayerNorm, NoNorm, RMSNorm, Rope
from llmkit.architecture.names import Fused, Names
from llmkit.errors import SpecError

from .chatglm2_spellings import GGUF, USUAL, as_glm, kv_heads, scaling, theta
from .chatglm_tokenizers import SENTENCEPIECE
from .glm import release_prompt


def _norm(config: Mapping[str, Any]) -> Kind:
    if config.get("apply_residual_connection_post_layernorm"):
        raise SpecError("config.json: apply_residual_connection_post_layernorm is true, which no release has")
    eps = config.get("layernorm_epsilon", 1e-5)
    return RMSNorm(eps=eps) if config.get("rmsnorm", True) else LayerNorm(eps=eps)


def _final_norm(config: Mapping[str, Any]) -> Kind:
    return _norm(config) if config.get("post_layer_norm", True) else NoNorm()


_TINY = {
    **USUAL, "num_layers": 2, "padded_vocab_size": 96, "hidden_size": 64, "ffn_hidden_size": 48, "kv_channels": 16,
    "multi_query_group_num": 2, "seq_length": 64, "layernorm_epsilon": 1e-5, "add_qkv_bias": True,
    "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_UNUSED = (
    "original_rope", "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion",
    "fp32_residual_connection", "interleaved_qkv", "hidden_act", "prefix_projection", "pre_seq_len",
)  # fmt: skip

CHATGLM2 = Architecture(
    name="chatglm2",
    releases=("ChatGLM2-6B", "ChatGLM3-6B", "CodeGeeX2", "GLM-4-9B"),
    matches=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    model_types=("chatglm",),
    when=lambda config: "padded_vocab_size" in config,
    dims=Dims(
        layers="num_layers",
        kv_heads=Computed(kv_heads),
        head_dim=Key("kv_channels", None),
        ffn="ffn_hidden_size",
        vocab="padded_vocab_size",
        context=Key("seq_length", None),
    ),
    block=Block(
        norm=Computed(_norm),
        attention=GroupedQuery(
            qkv_bias=Computed(lambda c: c.get("add_qkv_bias", False) or c.get("add_bias_linear", False)),
            out_bias=Key("add_bias_linear", False),
        ),
        position=Rope(theta=Computed(theta), scaling=Computed(scaling), share=0.5, pairs="interleaved"),
        mlp=GatedMLP("silu", bias=Key("add_bias_linear", False)),
    ),
    final_norm=Computed(_final_norm),
    equivalents={"glm": as_glm},
    # Switches of the code it was trained with, which give the same, or which its code never asks for.
    unused=_UNUSED,
    fixed={"quantization_bit": 0},
    prompt=Computed(lambda c: release_prompt(c, c.get("padded_vocab_size"), c.get("seq_length"))),
    tokenizer=SENTENCEPIECE,
    names=Names(
        embed="transformer.embedding.word_embeddings",
        final_norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        block="transformer.encoder.layers.{i}.",
        slots={
            "attn_norm": "input_layernorm",
            "attn.qkv": Fused("self_attention.query_key_value", ("q", "k", "v")),
            "attn.o": "self_attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "mlp.gate_up": Fused("mlp.dense_h_to_4h", ("gate", "up")),
            "mlp.down": "mlp.dense_4h_to_h",
        },
        ignored=("transformer.rotary_pos_emb.inv_freq",),
    ),
    gguf=GGUF,
    tiny=_TINY,
    variants={
        "chatglm2-6b-32k": {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 4},
        "chatglm3-6b-32k": {"_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50},
        "glm-4-9b": {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07},
        "glm-4-9b-chat-1m": {"rope_ratio": 10000, "multi_query_group_num": 4},
        "linear biases": {"add_bias_linear": True},
    },
)
