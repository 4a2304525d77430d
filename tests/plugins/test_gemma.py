"""What Gemma's configs mean beyond what the contract compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from llmkit.architecture.kinds import GatedMLP
from llmkit.architecture.registry import default_registry, require
from llmkit.architecture.scaling import LinearScaling, NoScaling
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.load import load_decoder
from llmkit.errors import RequirementError

PLUGINS = {p.name: p for p in default_registry().plugins}


def architecture(name):
    return default_registry().load(PLUGINS[name])


def test_models_that_see_later_tokens_are_refused():
    """Gemma 3's class computes so (EmbeddingGemma); those of Gemma 1 and 2 go without."""
    key = {"use_bidirectional_attention": True}
    for name in ("gemma", "gemma2", "gemma3"):
        found = architecture(name)
        wrong = f"use_bidirectional_attention is True, and {name} models are computed"
        with pytest.raises(RequirementError, match=wrong):
            load_decoder(random_checkpoint(found, {**found.tiny, **key}))
        assert not found.bind({**found.tiny, "use_bidirectional_attention": False}).unread.warnings


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="4.48 to 4.57 compute the exact GELU")
def test_gelu_means_its_approximation_in_the_first_files():
    found = architecture("gemma")
    config = found.tiny_config("first-files")
    assert config["hidden_act"] == "gelu"
    ckpt = random_checkpoint(found, config)
    theirs = transformers.GemmaForCausalLM(transformers.AutoConfig.for_model(**config)).eval()
    theirs.load_state_dict({n: t.load() for n, t in ckpt.tensors.items()}, strict=False)
    theirs.tie_weights()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert (load_decoder(ckpt)(ids) - theirs(ids).logits).abs().max() < 1e-4
    exact = load_decoder(ckpt, architecture=replace(found, block=replace(found.block, mlp=GatedMLP("gelu"))))
    assert (exact(ids) - load_decoder(ckpt)(ids)).abs().max() > 1e-3


def test_gemma3_4b_has_five_windows_and_one_scaled_layer_without():
    """The numbers of the text part of the release's config.json."""
    found = architecture("gemma3")
    config = {
        **found.tiny,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    del config["sliding_window_pattern"]
    blocks = found.bind(config).blocks
    assert [i for i, b in enumerate(blocks) if b.attention.window is None] == [5, 11, 17, 23, 29]
    assert {b.attention.window for b in blocks} == {1024, None}
    assert (blocks[5].position.theta, blocks[5].position.scaling) == (1000000.0, LinearScaling(8.0))
    assert (blocks[0].position.theta, blocks[0].position.scaling) == (10000.0, NoScaling())


def test_the_multimodal_wrapper_is_refused_by_name():
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}}
    with pytest.raises(RequirementError, match="no plugin describes its architecture: Gemma3ForConditionalGeneration"):
        require(config, "gemma-3-4b-it")
