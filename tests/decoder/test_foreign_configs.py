"""Configs for transformers' classes: infinities as it writes them, and values that its classes do not take."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.class_config import class_config
from llmkit.checkpoint.class_embeddings import class_embeddings
from llmkit.decoder.foreign import load_transformers, quiet_transformers
from llmkit.errors import SpecError

SIZES = {"hidden_size": 32, "vocab_size": 50, "num_hidden_layers": 2}
MODELS = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16},
    "bamba": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "attn_layer_indices": [1],
              "mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_d_state": 16, "mamba_n_groups": 1},
    "falcon_h1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "mamba_n_heads": 8,
                  "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_groups": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="4.x writes the bare word Infinity")
def test_an_infinite_limit_is_read_as_transformers_reads_it(tmp_path, name):
    with quiet_transformers():
        config = transformers.AutoConfig.for_model(name, **SIZES, **MODELS[name])
        config.time_step_limit = (0.0, float("inf"))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(tmp_path)
    ckpt = open_checkpoint(tmp_path)
    assert ckpt.config["time_step_limit"][1] == {"__float__": "Infinity"}
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        wanted = model(ids, use_cache=False).logits
    found = load_transformers(ckpt, torch.float32, torch.device("cpu"))(ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    broken = ckpt.derive(config={**ckpt.config, "hidden_size": "wide"})
    with pytest.raises(SpecError, match=r"does not take config\.json: .*hidden_size"):
        load_transformers(broken, torch.float32, torch.device("cpu"))


def test_a_config_that_its_class_refuses_has_no_embeddings_by_class():
    """Commands on models that no plugin describes ask the class for the names of embedding and head."""
    names = {"backbone.embeddings.weight", "lm_head.weight"}
    limits = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "expand": 2}
    config = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], **SIZES, **MODELS["mamba2"], **limits}
    model = transformers.Mamba2ForCausalLM._from_config(class_config(config, "m"))
    embed, head, _ = class_embeddings(config, names)
    assert dict(model.named_parameters())[embed] is model.get_input_embeddings().weight
    assert head in names - {embed}
    assert class_embeddings({**config, "time_step_limit": [0.0, "far"], "num_heads": "many"}, names) is None
    with pytest.raises(SpecError, match=r"m: transformers' Mamba2Config does not take config\.json"):
        class_config({**config, "num_heads": "many", "head_dim": {}}, "m")


@pytest.mark.parametrize(("name", "config"), [("bert", {}), ("bert", {"is_decoder": True}), ("llama", {})])
def test_a_class_that_sees_the_tokens_behind_is_said(tmp_path, name, config):
    sizes = {**SIZES, "num_attention_heads": 4, "intermediate_size": 32, "initializer_range": 0.5}
    with quiet_transformers():
        described = transformers.AutoConfig.for_model(name, **sizes, **config)
        transformers.AutoModelForCausalLM.from_config(described).save_pretrained(tmp_path)
    model = load_transformers(open_checkpoint(tmp_path), torch.float32, torch.device("cpu"))
    said = " ".join(model.doubts)
    is_encoder = name == "bert" and not config
    assert said.startswith("BertLMHeadModel is no causal model with this config" if is_encoder else "")
    assert bool(said) == is_encoder
