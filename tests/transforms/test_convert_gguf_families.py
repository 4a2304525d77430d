"""What llama.cpp knows of single families: what it leaves out, computes for itself or has in another form."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Q

import llmkit
from llmkit.architecture.difference import difference
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import InputError, RequirementError
from llmkit.tensors.spec import DType
from llmkit.transforms.convert import convert
from tests.transforms.test_convert_gguf import FAMILIES, PLUGINS, tiny, tiny_config, values, written


def of_keys(name, **keys):
    """The metadata and warnings (of the tokenizer aside) of a tiny model with other keys; None takes one away."""
    found = PLUGINS[name]
    config = {k: v for k, v in {**found.tiny_config(), **keys}.items() if v is not None}
    made = convert(random_checkpoint(found, config), to="gguf", type="f32")
    return made.container.metadata, [w for w in made.warnings if "no tokenizer" not in w]


def test_a_file_states_the_context_that_llama_cpp_needs():
    metadata, warnings = of_keys("bloom", seq_length=None)
    assert (metadata["bloom.context_length"], warnings) == (2048, [])
    metadata, (said,) = of_keys("llama", max_position_embeddings=None)
    assert metadata["llama.context_length"] == 2048
    assert "config.json states no context (max_position_embeddings)" in said


def test_betas_of_yarn_that_llama_cpp_does_not_read_are_said():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert of_keys("llama", rope_scaling=rope)[1] == []
    (said,) = of_keys("llama", rope_scaling=rope | {"beta_fast": 8.0})[1]
    assert "YaRN's beta_fast and beta_slow" in said
    assert "this model has 8 and 1" in said


@pytest.mark.parametrize(("name", "n"), [("glm4_moe", 46), ("glm4_moe_lite", 47)])
def test_layers_that_predict_further_tokens_are_left_out(tmp_path, name, n):
    """Files by llama.cpp count that layer of GLM-4.5-Air, the 47th, and have its tensors."""
    ckpt = random_checkpoint(FAMILIES[name], {**tiny_config(name), "num_hidden_layers": n})
    after = convert(replace(ckpt, label="tiny"), to="gguf", type="f32")
    more = {f"blk.{n}.{each}.weight": after.tensors["output_norm.weight"] for each in ("attn_norm", "nextn.enorm")}
    arch = FAMILIES[name].gguf.arch
    metadata = {**after.container.metadata, f"{arch}.block_count": n + 1, f"{arch}.nextn_predict_layers": 1}
    types = {**after.container.types, **dict.fromkeys(more, "F32")}
    container = replace(after.container, metadata=metadata, types=types)
    llmkit.save(replace(after, tensors={**after.tensors, **more}, container=container), tmp_path / "out")
    back = llmkit.open_checkpoint(tmp_path / "out")
    assert back.config["num_hidden_layers"] == n
    assert back.tensors.keys() == ckpt.tensors.keys()


@pytest.mark.parametrize(
    ("name", "key"), [("glm4_moe", "first_k_dense_replace"), ("ernie4_5_moe", "moe_layer_start_index")]
)
def test_models_whose_layers_are_all_dense_are_refused(name, key):
    ckpt = random_checkpoint(FAMILIES[name], {**tiny_config(name), key: 2})
    with pytest.raises(RequirementError, match=f"llama.cpp cannot run this {name} model: all its layers are dense"):
        convert(ckpt, to="gguf")


def test_dense_layers_between_those_of_experts_are_refused():
    every = {**tiny_config("ernie4_5_moe"), "moe_layer_interval": 2}
    assert convert(random_checkpoint(FAMILIES["ernie4_5_moe"], every), to="gguf").container is not None
    ckpt = random_checkpoint(FAMILIES["ernie4_5_moe"], {**every, "num_hidden_layers": 4})
    with pytest.raises(RequirementError, match="cannot hold this ernie4_5_moe model: mlp is GatedMLP"):
        convert(ckpt, to="gguf")


def test_decays_that_have_no_logarithm_are_refused_by_name(tmp_path):
    from llmkit.tensors.constant import constant_of

    ckpt = tiny("mamba")
    name = "backbone.layers.1.mixer.A_log"
    for value in (200.0, float("nan"), -float("inf")):
        bad = constant_of([value] * 512, DType.F32, (64, 8))
        with pytest.raises(InputError, match=f"{name} has the value .*, of which -exp is no negative float32"):
            written(replace(ckpt, tensors={**ckpt.tensors, name: bad}), tmp_path / f"{value}")
    written(ckpt, tmp_path / "out")
    path = next((tmp_path / "out").glob("*.gguf"))
    file = gguf.GGUFReader(path, "r+")
    decay = next(t for t in file.tensors if t.name == "blk.1.ssm_a")
    for value in (0.0, 0.25, float("nan"), -float("inf")):
        decay.data[3, 2] = value
        file.data.flush()
        back = llmkit.open_checkpoint(path)
        with pytest.raises(InputError, match=r"blk\.1\.ssm_a has the value .*: a decay of a state must be negative"):
            back.tensors[name].load()


def test_heads_of_qwen3_5_lie_in_turn_of_its_key_heads(tmp_path):
    """Value heads 0 and 1 read key head 0, 2 and 3 key head 1; ggml repeats key heads 0, 1, 0, 1."""
    ckpt = tiny("qwen3_5")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    w = {n: ckpt.tensors[f"model.layers.0.linear_attn.{n}"].load() for n in ("in_proj_z.weight", "out_proj.weight")}
    order = [0, 2, 1, 3]
    assert torch.equal(stored["blk.0.attn_gate.weight"], w["in_proj_z.weight"].view(4, 16, -1)[order].flatten(0, 1))
    assert torch.equal(stored["blk.0.ssm_out.weight"], w["out_proj.weight"].view(-1, 4, 16)[:, order].flatten(1))
    a_log = ckpt.tensors["model.layers.0.linear_attn.A_log"].load()
    assert torch.allclose(stored["blk.0.ssm_a"], -a_log.exp()[order], rtol=2**-22, atol=0)
    norms = "blk.0.ssm_norm.weight", "model.layers.0.linear_attn.norm.weight"
    assert torch.equal(stored[norms[0]], ckpt.tensors[norms[1]].load())  # this one is not shifted


def test_what_a_token_is_mixed_by_is_one_tensor_of_rwkv_7(tmp_path):
    ckpt = tiny("rwkv7")
    stored = {t.name: t for t in written(ckpt, tmp_path / "out", "f16").tensors}
    mixes = [ckpt.tensors[f"model.layers.1.attn.x_{name}"].load().flatten() for name in "rwkvag"]
    fused = stored["blk.1.time_mix_lerp_fused.weight"]
    assert fused.tensor_type is Q.F32
    assert [int(n) for n in fused.shape] == [128, 1, 1, 6]
    assert torch.equal(values(fused).view(6, 128), torch.stack(mixes))
    first = [stored[f"blk.0.time_mix_{name}.weight"] for name in ("v1", "a1")]
    assert torch.equal(*map(values, first))  # which llama.cpp wants and does not read
    assert "model.layers.0.attn.v_lora.lora.0.weight" not in llmkit.open_checkpoint(tmp_path / "out").tensors


def test_halves_of_kv_b_lie_apart_head_by_head(tmp_path):
    """As llama.cpp's converter has them: that of the keys is transposed."""
    ckpt = tiny("deepseek3")
    stored = {t.name: values(t) for t in written(ckpt, tmp_path / "out").tensors}
    heads = ckpt.tensors["model.layers.1.self_attn.kv_b_proj.weight"].load().view(4, 12 + 8, 16)
    assert torch.equal(stored["blk.1.attn_k_b.weight"], heads[:, :12].transpose(1, 2))
    assert torch.equal(stored["blk.1.attn_v_b.weight"], heads[:, 12:])


@pytest.mark.parametrize("name", ["deepseek3", "mistral4"])
def test_files_that_have_kv_b_whole_are_read(tmp_path, name):
    ckpt = tiny(name)
    after = convert(ckpt, to="gguf", type="f32")
    arch = FAMILIES[name].gguf.arch
    tensors = {n: t for n, t in after.tensors.items() if not n.endswith(("attn_k_b.weight", "attn_v_b.weight"))}
    for i in range(2):
        tensors[f"blk.{i}.attn_kv_b.weight"] = ckpt.tensors[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
    lengths = {
        "key_length": 16,
        "value_length": 8,
        "head_count_kv": 4,
        "key_length_mla": None,
        "value_length_mla": None,
    }
    metadata = {**after.container.metadata, **{f"{arch}.attention.{k}": v for k, v in lengths.items()}}
    metadata = {k: v for k, v in metadata.items() if v is not None}
    container = replace(after.container, metadata=metadata, types=dict.fromkeys(tensors, "F32"))
    llmkit.save(replace(after, tensors=tensors, container=container), tmp_path / "out")
    back = llmkit.open_checkpoint(tmp_path / "out")
    assert difference(*(FAMILIES[name].bind(dict(each.config)) for each in (ckpt, back))) is None
    for tensor, lazy in ckpt.tensors.items():
        assert torch.equal(back.tensors[tensor].load(), lazy.load()), tensor


def test_gemma_3n_as_llama_cpps_converter_writes_it(tmp_path):
    """Widths in a list, no base of positions with a window, and inputs for all ids: who lacks a row has the first."""
    ckpt = tiny("gemma3n")
    after = convert(ckpt, to="gguf", type="f32")
    metadata = {**after.container.metadata, "gemma3n.feed_forward_length": [48] * 22}
    for key in ("llmkit.config", "gemma3n.rope.freq_base_swa", "gemma3n.vocab_size"):
        del metadata[key]
    llmkit.save(replace(after, container=replace(after.container, metadata=metadata)), tmp_path / "out")
    back = llmkit.open_checkpoint(tmp_path / "out")
    assert (back.config["intermediate_size"], back.config["vocab_size_per_layer_input"]) == ([48] * 22, 96)
    name = "model.embed_tokens_per_layer.weight"
    want = ckpt.tensors[name].load()
    assert torch.equal(back.tensors[name].load(), torch.cat([want, want[:1].expand(6, -1)]))
    ids = torch.tensor([[5, 95, 90, 89, 0, 7, 8, 9, 10, 11]])
    plain = replace(ckpt, config={**ckpt.config, "rope_local_base_freq": None})
    with torch.inference_mode():
        same, found = (llmkit.load_decoder(each, dtype="float32")(ids) for each in (plain, back))
    assert torch.equal(same, found)


def test_scores_that_a_file_does_not_state_follow_from_its_correction(tmp_path):
    """As in files of GLM-4.7-Flash, whose config.json has no scoring_func for the converter."""
    ckpt = tiny("glm4_moe_lite")
    after = convert(ckpt, to="gguf", type="f32")
    metadata = {k: v for k, v in after.container.metadata.items() if "gating_func" not in k and k != "llmkit.config"}
    llmkit.save(replace(after, container=replace(after.container, metadata=metadata)), tmp_path / "out")
    back = llmkit.open_checkpoint(tmp_path / "out")
    assert difference(ckpt.require_model(), back.require_model()) is None
