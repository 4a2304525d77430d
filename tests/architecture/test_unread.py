"""Keys of a config that no kind reads: said, refused, or known to change nothing."""

from __future__ import annotations

import pytest

from llmkit.architecture.registry import default_registry
from llmkit.architecture.unread import RecordedConfig, unread_keys
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.load import load_decoder
from llmkit.decoder.preflight import model_warnings
from llmkit.errors import RequirementError, SpecError
from llmkit.inspection.summary import summarize
from llmkit.onnx.export import export as export_onnx
from llmkit.transforms.convert import convert

PLUGINS = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}
LLAMA = PLUGINS["llama"]


def checkpoint(name="llama", **keys):
    found = PLUGINS[name]
    return random_checkpoint(found, {**found.tiny, **keys})


def test_a_view_notes_what_is_read_of_it():
    config = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}
    view = RecordedConfig(config)
    assert (view["a"], view.get("b")["c"], view.get("z", 5)) == (1, 2, 5)
    assert view.read == {"a": 1, "b": {"c": 2, "d": 3}, "b.c": 2}
    left = unread_keys(config, view.read, fixed={"e": 4}, unused=(), family="x")
    assert left.unknown == ("b.d",)
    assert unread_keys(config, view.read, fixed={"e": 5}, unused=("b.*",), family="x").refused == (
        "e is 4, and x models are computed with 5",
    )


@pytest.mark.parametrize("name", PLUGINS)
def test_nothing_is_said_of_the_families_own_configs(name):
    for variant in (None, *PLUGINS[name].variants):
        left = PLUGINS[name].bind(PLUGINS[name].tiny_config(variant)).unread
        assert (left.refused, left.unknown) == ((), ()), variant


def test_nothing_is_said_of_what_is_computed_anyway():
    for name, keys in (
        ("gpt_neox", {"head_dim": 8}),
        ("granitemoe", {"position_embedding_type": "rope"}),
        ("granitehybrid", {"layer_types": ["mamba", "mamba"]}),
        ("granitemoehybrid", {"layer_types": ["mamba", "mamba"]}),
    ):
        left = PLUGINS[name].bind({**PLUGINS[name].tiny, **keys}).unread
        assert (left.refused, left.unknown) == ((), ()), name


def test_an_unknown_key_is_said_by_what_computes(tmp_path):
    ckpt = checkpoint(clip_qkv=8.0, rope_scaling={"rope_type": "linear", "factor": 2.0, "mscale": 2.0})
    (said,) = model_warnings(ckpt)
    assert said == (
        "config.json: llmkit does not read clip_qkv, rope_scaling.mscale; if they change what the model computes, "
        "it is computed without them here"
    )
    assert model_warnings(ckpt, "transformers") == []
    assert said in summarize(ckpt).oddities
    assert said in convert(ckpt, to="litgpt").warnings
    assert said not in convert(ckpt, to="bin").warnings
    pytest.importorskip("onnx", reason="needs onnx (extra onnx)")
    assert said in export_onnx(ckpt).warnings


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("llama", {"is_causal": False}, "is_causal is False, and llama models are computed with True"),
        ("gpt_neox", {"rope_theta": 5e5}, "rope_theta is 500000.0, and gpt_neox models are computed with 10000"),
        ("rwkv", {"attention_hidden_size": 64}, "attention_hidden_size is 64, and rwkv models are computed with 32"),
        ("stablelm", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor is 2.0"),
        ("gpt_neox", {"head_dim": 16}, "head_dim is 16, and gpt_neox models are computed with 8"),
        ("stablelm", {"head_dim": 4}, "head_dim is 4, and stablelm models are computed with 16"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("granitemoe", {"position_embedding_type": "nope"}, "position_embedding_type is 'nope'"),
        ("deepseek2", {"mlp_bias": True}, "mlp_bias is True, and deepseek2 models are computed with False"),
        ("mistral4", {"head_dim": 8}, "head_dim is 8, and mistral4 models are computed with 16"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ],
)
def test_a_key_that_changes_the_numbers_is_refused(name, keys, words):
    ckpt = checkpoint(name, **keys)
    for compute in (load_decoder, export_onnx, lambda c: convert(c, to="gguf"), lambda c: convert(c, to="litgpt")):
        if PLUGINS[name].gguf is None and compute is not load_decoder and compute is not export_onnx:
            continue
        with pytest.raises(RequirementError, match=words) as caught:
            compute(ckpt)
        assert "--backend transformers" in caught.value.hint
    assert any(words in problem for problem in summarize(ckpt).problems)
    assert convert(ckpt, to="bin").warnings == ()  # the same bytes in another container


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", float("inf"), "hidden_size is inf, expected a finite number"),
        ("hidden_size", float("nan"), "hidden_size is nan"),
        ("hidden_size", "32", "hidden_size is '32', expected a positive whole number"),
        ("num_hidden_layers", True, "num_hidden_layers is True"),
        ("num_hidden_layers", 2**31, "num_hidden_layers is 2147483648, expected a positive whole number up to 10,000"),
        ("num_attention_heads", -4, "num_attention_heads is -4"),
        ("vocab_size", 6 * 10**16, "vocab_size is 60000000000000000"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps is '1e-6', expected a finite number"),
        ("rms_norm_eps", [1], r"rms_norm_eps is \[1\]"),
        ("rope_theta", float("-inf"), "rope_theta is -inf"),
        ("rope_theta", 0, "rope_theta is 0"),
        ("attention_bias", "no", "attention_bias is 'no', expected true or false"),
        ("hidden_act", 7, "hidden_act is 7, expected a text"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling.factor is '2'"),
        ("rope_scaling", {"type": "linear", "factor": 0}, "rope_scaling.factor is 0"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "beta_fast": float("nan")}, "rope_scaling.beta_fast is nan"),
        ("rope_scaling", "linear", "expected an object"),
        ("rope_scaling", {"type": ["yarn"]}, r"RoPE scaling"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(key, value, words):
    with pytest.raises((SpecError, RequirementError), match=words):
        load_decoder(random_checkpoint(LLAMA, LLAMA.tiny).derive(config={**LLAMA.tiny, key: value}))


def test_what_a_plugin_cannot_compute_with_is_named():
    config = {**PLUGINS["gemma2"].tiny, "query_pre_attn_scalar": "many"}
    with pytest.raises(SpecError, match=r"gemma2 cannot be made of it .*query_pre_attn_scalar is 'many'"):
        PLUGINS["gemma2"].bind(config)
