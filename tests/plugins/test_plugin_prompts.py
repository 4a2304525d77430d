"""Which format and which tokenizer a release gets, by its published config."""

from __future__ import annotations

import pytest

from llmkit.architecture import registry
from llmkit.architecture.prompts import FORMATS
from llmkit.architecture.tokenizers import published_tokenizers

GLM = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
NEW = GLM | {"padded_vocab_size": 65024}
NATIVE = {"architectures": ["GlmForCausalLM"], "model_type": "glm"}
BAICHUAN = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
RWKV = {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"}


@pytest.mark.parametrize(
    ("config", "prompt", "tokenizer"),
    [
        (GLM | {"vocab_size": 130528, "position_encoding_2d": True}, "chatglm", "ice-text"),
        (NEW | {"_name_or_path": "THUDM/chatglm2-6b", "seq_length": 32768}, "chatglm2", "glm-sentencepiece"),
        (NEW | {"seq_length": 32768}, "chatglm2", "glm-sentencepiece"),
        (NEW | {"_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192}, "chatglm3", "glm-sentencepiece"),
        (NEW | {"_name_or_path": "THUDM/chatglm3-6b-32k", "seq_length": 32768}, "chatglm3", "glm-sentencepiece"),
        (GLM | {"padded_vocab_size": 151552, "seq_length": 131072}, "glm-4", "glm-sentencepiece"),
        (NATIVE | {"vocab_size": 65024, "_name_or_path": "THUDM/chatglm2-6b"}, "chatglm2", "glm-sentencepiece"),
        (NATIVE | {"vocab_size": 65024, "max_position_embeddings": 8192}, "chatglm3", "glm-sentencepiece"),
        (NATIVE | {"vocab_size": 151552}, "glm-4", "glm-sentencepiece"),
        (BAICHUAN | {"max_position_embeddings": 4096, "vocab_size": 64000}, "baichuan-chat", "baichuan"),
        (BAICHUAN | {"model_max_length": 4096, "vocab_size": 125696}, "baichuan2-chat", "baichuan"),
        (RWKV | {"vocab_size": 65536}, "rwkv-world", "rwkv-world"),
        (RWKV | {"vocab_size": 50277}, "rwkv-raven", "rwkv-world"),
    ],
)
def test_the_release_decides(config, prompt, tokenizer):
    architecture = registry.find(config)
    assert architecture.prompt_of(config) is FORMATS[prompt]
    assert architecture.tokenizer is published_tokenizers()[tokenizer]
