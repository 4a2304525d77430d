"""ChatGLM-6B (the first one): a prefix-LM with rotary positions in two dimensions and scaled, normalised residuals.

A prompt ends with [gMASK] (or [MASK]) and <sop>, which is where the answer starts. Everything before <sop> is seen by
every token; the first half of each head's dims is rotated by the place in the prompt (answers all stand at the mask's),
the second half with the place in the answer. Source: modeling_chatglm.py of THUDM/chatglm-6b.
"""

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GroupedQuery, LayerNorm, NormedResidual, PlainMLP
from llmkit.architecture.names import Names
from llmkit.architecture.prompts import FORMATS

from .chatglm_positions import TwoDimensionalRope
from .chatglm_tokenizers import ICE_TEXT
from .gpt_neox import megatron

# The original makes every layer with its default of 28 layers, whatever the config says.
ALPHA = (2 * 28) ** 0.5
_TINY = {
    "num_layers": 2, "inner_hidden_size": 64, "layernorm_epsilon": 1e-5, "max_sequence_length": 64,
    "position_encoding_2d": True, "bos_token_id": 92, "eos_token_id": 93, "pad_token_id": 3, "mask_token_id": 90,
    "gmask_token_id": 91,
}  # fmt: skip

CHATGLM = Architecture(
    name="chatglm",
    releases=("ChatGLM-6B",),
    matches=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    model_types=("chatglm",),
    when=lambda config: "padded_vocab_size" not in config,
    dims=Dims(
        layers=Key(("num_layers", "num_hidden_layers")),
        ffn=Computed(lambda config: config.get("inner_hidden_size") or 4 * int(config["hidden_size"])),
        context=Key("max_sequence_length", None),
    ),
    block=Block(
        norm=LayerNorm(eps=Key("layernorm_epsilon", 1e-5)),
        attention=GroupedQuery(qkv_bias=True, out_bias=True),
        position=TwoDimensionalRope(Key("bos_token_id"), Key("gmask_token_id"), Key("mask_token_id")),
        mlp=PlainMLP("gelu_pytorch_tanh"),
        residual=NormedResidual(ALPHA),
    ),
    unused=("prefix_projection", "pre_seq_len", "quantization_embeddings"),
    fixed={"position_encoding_2d": True, "quantization_bit": 0},
    prompt=FORMATS["chatglm"],
    tokenizer=ICE_TEXT,
    prompt_suffix=Computed(lambda config: [config["gmask_token_id"], config["bos_token_id"]]),
    names=Names(
        embed="transformer.word_embeddings",
        final_norm="transformer.final_layernorm",
        head="lm_head",
        block="transformer.layers.{i}.",
        slots=megatron("attention"),
        ignored=("*.rotary_emb.inv_freq",),
    ),
    tiny=_TINY,
)
