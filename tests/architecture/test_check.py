"""Do tensors fit a config? Missing, extra, misshapen, tied and ignorable tensors, each named."""

from __future__ import annotations

import pytest
import transformers

from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.registry import find
from llmkit.errors import SpecError, nearest
from llmkit.tensors.spec import DType, TensorSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def bind(**changes):
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    return find(config).bind(config)


def specs_of(**changes):
    """Names and shapes as transformers has them."""
    import torch

    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    tied = config.get("tie_word_embeddings")
    return {
        name: TensorSpec(DType.F16, tuple(t.shape))
        for name, t in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"num_key_value_heads": ...}, {"head_dim": 16},
        {"head_dim": None}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True},
    ],
    ids=str,
)  # fmt: skip
def test_transformers_names_and_shapes_fit(changes):
    model, specs = bind(**changes), specs_of(**changes)
    report = model.check(specs)
    assert report.is_ok
    assert report == type(report)()
    required = {name: slot.shape for name, slot in model.tensors().items() if not slot.is_optional}
    assert required == {name: spec.shape for name, spec in specs.items()}
    assert model.n_parameters == sum(spec.numel for spec in specs.values())


def test_missing_and_extra_are_named():
    specs = specs_of()
    specs["model.layers.1.self_attn.query.weight"] = specs.pop("model.layers.1.self_attn.q_proj.weight")
    report = bind().check(specs)
    assert report.missing == ("model.layers.1.self_attn.q_proj.weight",)
    assert report.extra == ("model.layers.1.self_attn.query.weight",)
    text = "; ".join(report.problems)
    assert "1 tensor missing: model.layers.1.self_attn.q_proj.weight" in text
    assert "there is model.layers.1.self_attn.query.weight" in text
    with pytest.raises(SpecError, match="ckpt-name: the tensors do not fit") as caught:
        report.raise_if_bad("ckpt-name")
    assert "config.json" in caught.value.hint


def test_more_layers_than_the_config_says_are_extra():
    report = bind(num_hidden_layers=2).check(specs_of())
    assert len(report.extra) == 9
    assert not report.missing
    report = bind(num_hidden_layers=4).check(specs_of())
    assert len(report.missing) == 9
    assert "and 4 more" in report.problems[0]


def test_swapped_shapes_name_the_keys():
    specs = specs_of()
    for i in range(3):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        specs[name] = TensorSpec(DType.F16, specs[name].shape[::-1])
    (problem,) = bind().check(specs).problems
    assert problem == (
        "model.layers.0.mlp.down_proj.weight (and 2 more layers) has shape [48, 32], expected [32, 48] = "
        "[hidden_size, intermediate_size] by config.json"
    )


@pytest.mark.parametrize(
    ("changes", "tensor", "formula"),
    [
        ({"num_key_value_heads": 4}, "k_proj", "num_key_value_heads * hidden_size/num_attention_heads"),
        ({"head_dim": 16}, "q_proj", "num_attention_heads * head_dim"),
        ({"vocab_size": 100}, "embed_tokens", "vocab_size, hidden_size"),
        ({"intermediate_size": 64}, "gate_proj", "intermediate_size, hidden_size"),
    ],
)
def test_a_config_that_disagrees(changes, tensor, formula):
    problems = [p for p in bind(**changes).check(specs_of()).problems if tensor in p]
    assert len(problems) == 1
    assert formula in problems[0]


def test_vocabulary_rows():
    specs = specs_of()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        specs[name] = TensorSpec(DType.F16, (97, 32))
    problems = bind().check(specs).problems
    assert problems[0] == (
        "model.embed_tokens.weight has shape [97, 32], expected [96, 32] = [vocab_size, hidden_size] by config.json"
    )
    assert "lm_head.weight has shape [97, 32]" in problems[1]


def test_tied_heads():
    specs = specs_of()
    report = bind(tie_word_embeddings=True).check(specs)
    assert report.is_ok
    assert "lm_head.weight is stored, too: a copy of the embedding" in report.notes[0]
    del specs["lm_head.weight"]
    assert bind(tie_word_embeddings=True).check(specs).notes == ()
    for untied in (False, ...):  # absent means untied in this family
        report = bind(tie_word_embeddings=untied).check(specs)
        assert "lm_head.weight is missing, and the config does not tie" in report.problems[0]
        with pytest.raises(SpecError) as caught:
            report.raise_if_bad("m")
        assert caught.value.hint.endswith("set tie_word_embeddings to true")
    assert not bind().check({**specs, "x": specs["model.norm.weight"]}).lacks_head


def test_rotary_buffers_are_ignored_and_said_to_be():
    specs = specs_of()
    for i in range(3):
        specs[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = TensorSpec(DType.F32, (4,))
    report = bind().check(specs)
    assert report.is_ok
    assert len(report.ignored) == 3
    assert "3 buffers that nothing needs are ignored" in report.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "no 'hidden_size'"),
        ({"vocab_size": ...}, "no 'vocab_size'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected a positive whole number"),
        ({"hidden_size": None}, "config.json: hidden_size is null"),
        ({"hidden_size": {"a": 1}}, r"hidden_size is \{'a': 1\}, expected a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(SpecError, match=message):
        bind(**changes)


def test_a_size_that_a_plugin_counts_with_is_named():
    falcon = find({"model_type": "falcon_h1"})
    config = {k: v for k, v in falcon.tiny_config().items() if k != "num_attention_heads"}
    with pytest.raises(SpecError, match="no 'num_attention_heads', which"):
        falcon.bind(config)


@pytest.mark.parametrize(("name", "key"), [("rwkv5", "head_size"), ("rwkv6", "head_size"), ("rwkv7", "head_dim")])
def test_a_stream_of_no_whole_number_of_heads_is_refused(name, key):
    rwkv = find({"model_type": name})
    with pytest.raises(SpecError, match=f"hidden_size 36 is not a multiple of {key} 8"):
        rwkv.bind(rwkv.tiny_config() | {"hidden_size": 36, key: 8})


def test_null_is_not_absence():
    """As in transformers' classes, whose defaults are for what is not stated."""
    ernie = find({"model_type": "ernie4_5"})
    sizes = ernie.bind({**ernie.tiny_config(), "head_dim": None, "num_key_value_heads": None}).dims
    assert (sizes.head_dim, sizes.kv_heads) == (8, 4)


def test_a_misspelt_key_is_guessed():
    with pytest.raises(SpecError) as caught:
        bind(hidden_size=..., hidden_sise=32)
    assert "'hidden_sise'" in caught.value.hint


def test_what_a_config_leaves_out_is_the_default_of_its_class():
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
    assert find(config).bind(config).dims.context == transformers.GPT2Config().n_positions


def test_a_missing_size_is_no_flag_with_a_name_like_it():
    assert nearest("max_position_embeddings", ["tie_word_embeddings"]) == "tie_word_embeddings"
    with pytest.raises(SpecError, match="has no 'max_position_embeddings'") as error:
        lookup(Key("max_position_embeddings"), {"tie_word_embeddings": True, "vocab_size": 96})
    assert error.value.hint is None
