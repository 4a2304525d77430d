"""lit-llama (read) and litgpt (both ways): tensors fused as their converters do, in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_world import config, interleaved, meta_logits, same, state_of, write_hf

import llmkit
from llmkit.errors import InputError, RequirementError
from llmkit.inspection.check import check_output
from llmkit.transforms.convert import convert

HEADS = st.sampled_from([(4, 4), (4, 2), (6, 3), (4, 1)])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def lit_llama(state, cfg):
    n = cfg["num_attention_heads"]
    found = {"lm_head.weight": state["lm_head.weight"], "transformer.wte.weight": state["model.embed_tokens.weight"]}
    found["transformer.ln_f.scale"] = state["model.norm.weight"]
    for i in range(cfg["num_hidden_layers"]):
        p, q = f"model.layers.{i}.", f"transformer.h.{i}."
        attn = [state[f"{p}self_attn.{x}_proj.weight"] for x in "qkv"]
        found[f"{q}attn.c_attn.weight"] = torch.cat([interleaved(attn[0], n), interleaved(attn[1], n), attn[2]])
        found[f"{q}attn.c_proj.weight"] = state[f"{p}self_attn.o_proj.weight"]
        found[f"{q}mlp.c_fc1.weight"] = state[f"{p}mlp.gate_proj.weight"]
        found[f"{q}mlp.c_fc2.weight"] = state[f"{p}mlp.up_proj.weight"]
        found[f"{q}mlp.c_proj.weight"] = state[f"{p}mlp.down_proj.weight"]
        found[f"{q}rms_1.scale"] = state[f"{p}input_layernorm.weight"]
        found[f"{q}rms_2.scale"] = state[f"{p}post_attention_layernorm.weight"]
    return found


def litgpt(state, cfg, is_old):
    n, nkv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    d = cfg["hidden_size"] // n
    found = {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"])}
    found["transformer.wte.weight"] = state["model.embed_tokens.weight"]
    found["transformer.ln_f.weight"] = state["model.norm.weight"]
    for i in range(cfg["num_hidden_layers"]):
        p, to = f"model.layers.{i}.", f"transformer.h.{i}."
        q, k, v = (state[f"{p}self_attn.{x}_proj.weight"] for x in "qkv")
        if is_old:
            groups = zip(q.split(n // nkv * d), k.split(d), v.split(d), strict=True)
            found[f"{to}attn.attn.weight"] = torch.cat([x for group in groups for x in group])
        else:
            found[f"{to}attn.qkv.weight"] = torch.cat((q, k, v))
        found[f"{to}attn.proj.weight"] = state[f"{p}self_attn.o_proj.weight"]
        for ours, theirs in (("gate", "fc_1"), ("up", "fc_2"), ("down", "proj")):
            found[f"{to}mlp.{theirs}.weight"] = state[f"{p}mlp.{ours}_proj.weight"]
        found[f"{to}norm_1.weight"] = state[f"{p}input_layernorm.weight"]
        found[f"{to}norm_2.weight"] = state[f"{p}post_attention_layernorm.weight"]
    return found


def settings_of(cfg, **more):
    """model_config.yaml as litgpt saves its Config: all fields, whether they are used or not."""
    n, h = cfg["num_attention_heads"], cfg["hidden_size"]
    return {
        "name": "tiny", "hf_config": {"org": "o", "name": "n"}, "scale_embeddings": False, "block_size": 2048,
        "vocab_size": cfg["vocab_size"], "padding_multiple": 64, "padded_vocab_size": cfg["vocab_size"],
        "n_layer": cfg["num_hidden_layers"], "n_head": n, "head_size": h // n, "n_embd": h,
        "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "lm_head_bias": False,
        "n_query_groups": cfg["num_key_value_heads"], "shared_attention_norm": False, "norm_class_name": "RMSNorm",
        "norm_eps": cfg["rms_norm_eps"], "mlp_class_name": "LLaMAMLP", "gelu_approximate": "none",
        "intermediate_size": cfg["intermediate_size"], "rope_condense_ratio": 1, "rope_base": 10000, "n_expert": 0,
        "post_attention_norm": False, "post_mlp_norm": False, "sliding_window_size": None, "rope_adjustments": None,
        **more,
    }  # fmt: skip


def write_litgpt(folder: Path, state, cfg, is_old=False, **more) -> Path:
    folder.mkdir(parents=True)
    torch.save(litgpt(state, cfg, is_old), folder / "lit_model.pth")
    if is_old:
        (folder / "lit_config.json").write_text(json.dumps(settings_of(cfg, **more)))
    else:
        (folder / "model_config.yaml").write_text(yaml.safe_dump(settings_of(cfg, **more)))
    return folder


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([2, 4]), st.integers(33, 61), DTYPES)
def test_lit_llama_is_read_bit_for_bit(heads, vocab, dtype):
    cfg = config(heads, heads, 128, layers=1, ffn=24, vocab=vocab)
    state = state_of(cfg, dtype)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "lit-llama.pth"
        torch.save(lit_llama(state, cfg), path)
        for where in (path, Path(scratch)):
            read = llmkit.open_checkpoint(where)
            assert read.layout == "lit-llama"
            assert read.config["num_attention_heads"] == heads
            assert any("heads of 128 dims" in n for n in read.notes)
            same(read, state)


def test_lit_llama_with_a_config_beside(tmp_path):
    cfg = config(4, 4, 8)
    state = state_of(cfg)
    torch.save({"model": lit_llama(state, cfg)}, tmp_path / "lit-llama.pth")
    with pytest.raises(InputError, match="hidden size 32 is no multiple of 128") as caught:
        llmkit.open_checkpoint(tmp_path)
    assert caught.value.hint == "put the config.json of this model beside the file"
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    read = llmkit.open_checkpoint(tmp_path)
    same(read, state)
    ids = torch.tensor([1, 5, 9, 2])
    want = meta_logits(state, cfg, ids)
    found = llmkit.load_decoder(read, dtype="float32")(ids[None])[0]
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    (tmp_path / "config.json").write_text(json.dumps(cfg | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"7 tensors missing: transformer.h.2.rms_1.scale"):
        llmkit.open_checkpoint(tmp_path)


@settings(max_examples=20, deadline=None)
@given(HEADS, st.sampled_from([2, 4, 8]), st.integers(33, 61), DTYPES, st.booleans(), st.booleans())
def test_litgpt_there_and_back(heads, head_dim, vocab, dtype, is_old, is_tied):
    cfg = config(*heads, head_dim, ffn=24, vocab=vocab, tie_word_embeddings=is_tied)
    state = state_of(cfg, dtype)
    with TemporaryDirectory() as scratch:
        home = Path(scratch)
        source = write_litgpt(home / "lit", state, cfg, is_old)
        (source / "config.json").write_text(json.dumps(cfg))
        read = llmkit.open_checkpoint(source)
        assert read.layout == "litgpt"
        same(read, state)
        hf = llmkit.open_checkpoint(write_hf(home / "hf", cfg, state))
        llmkit.save(convert(hf, to="litgpt"), home / "out")
        found, want = torch.load(home / "out/lit_model.pth", weights_only=True), litgpt(state, cfg, False)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], want[k]) and found[k].dtype == want[k].dtype for k in want)
        same(llmkit.open_checkpoint(home / "out"), state)
        assert check_output(home / "out").is_ok
        llmkit.save(convert(llmkit.open_checkpoint(home / "out"), to="hf"), home / "back")
        assert (home / "back/model.safetensors").read_bytes() == (home / "hf/model.safetensors").read_bytes()
        assert json.loads((home / "back/config.json").read_text()) == cfg
        assert not (home / "back/model_config.yaml").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 16},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)  # fmt: skip
def test_litgpts_settings_say_what_the_config_says(tmp_path, changes):
    cfg = config() | changes
    if "head_dim" in changes:
        state = state_of(config())
        for i in range(2):
            for name, rows in (("q", 64), ("k", 32), ("v", 32)):
                state[f"model.layers.{i}.self_attn.{name}_proj.weight"] = torch.randn(rows, 32)
            state[f"model.layers.{i}.self_attn.o_proj.weight"] = torch.randn(32, 64)
    else:
        state = state_of(cfg)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state))
    llmkit.save(convert(hf, to="litgpt"), tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    back = llmkit.open_checkpoint(tmp_path / "out")
    assert back.config == cfg
    same(back, state)
    stated = yaml.safe_load((tmp_path / "out/model_config.yaml").read_text())
    assert set(stated) <= {*settings_of(cfg), "rope_condense_ratio", "rope_adjustments"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parallel_residual": True}, "parallel_residual is True; of litgpt's models those with False are read"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name is 'GemmaMLP'"),
        ({"rope_base": "ten"}, "missing or malformed"),
        ({"n_layer": 3}, "transformer.h.2.norm_1.weight"),
        ({"n_query_groups": 4}, "has shape [64, 32], expected [96, 32]"),
    ],
)
def test_settings_that_are_not_read(tmp_path, more, message):
    cfg = config()
    source = write_litgpt(tmp_path / "lit", state_of(cfg), cfg, **more)
    with pytest.raises(InputError) as caught:
        llmkit.open_checkpoint(source)
    assert message in caught.value.message
    assert caught.value.hint


def test_weights_without_settings(tmp_path):
    cfg = config()
    source = write_litgpt(tmp_path / "lit", state_of(cfg), cfg)
    (source / "model_config.yaml").write_text("- 1")
    with pytest.raises(InputError, match="expected keys and values, found list"):
        llmkit.open_checkpoint(source)
    (source / "model_config.yaml").unlink()
    with pytest.raises(InputError, match=r"is of litgpt, and no model_config.yaml lies beside it"):
        llmkit.open_checkpoint(source)


def test_what_litgpt_cannot_hold(tmp_path):
    cfg = config(attention_bias=True)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(cfg)))
    with pytest.raises(RequirementError, match=r"--to litgpt cannot hold this llama model: attention\.qkv_bias"):
        convert(hf, to="litgpt")
