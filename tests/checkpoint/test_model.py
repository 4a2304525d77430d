"""What a checkpoint says of its model: the registry is asked in one place."""

from __future__ import annotations

import pytest
import transformers

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import RequirementError, SpecError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


def test_the_model_of_a_checkpoint():
    config = transformers.LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    ckpt = Checkpoint("m", {}, config)
    assert ckpt.model is ckpt.require_model()
    names = set(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).state_dict())
    assert set(ckpt.model.tensors()) == names
    smaller = ckpt.derive(config={**config, "num_hidden_layers": 1})
    assert (smaller.model.dims.layers, ckpt.model.dims.layers) == (1, 3)
    with pytest.raises(SpecError, match="num_attention_heads"):
        _ = ckpt.derive(config={**config, "num_attention_heads": 5}).model


def test_a_model_that_no_plugin_describes():
    ckpt = Checkpoint("m", {}, {"architectures": ["ZebraForCausalLM"]})
    assert (ckpt.architecture, ckpt.model, Checkpoint("m", {}, {}).model) == (None, None, None)
    with pytest.raises(RequirementError, match="m: no plugin describes its architecture: ZebraForCausalLM"):
        ckpt.require_model()
