"""TencentPretrain's layout, made by its converter's formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_world import config, interleaved, meta_logits, same, state_of

import llmkit
from llmkit.errors import InputError


def tencent(state, cfg, embed="embedding.word.embedding"):
    n = cfg["num_attention_heads"]
    found = {f"{embed}.weight": state["model.embed_tokens.weight"]}
    for i in range(cfg["num_hidden_layers"]):
        p, to = f"model.layers.{i}.", f"encoder.transformer.{i}."
        q, k, v = (state[f"{p}self_attn.{x}_proj.weight"] for x in "qkv")
        for j, w in enumerate((interleaved(q, n), interleaved(k, n), v)):
            found[f"{to}self_attn.linear_layers.{j}.weight"] = w
        found[f"{to}self_attn.final_linear.weight"] = state[f"{p}self_attn.o_proj.weight"]
        found[f"{to}feed_forward.linear_gate.weight"] = state[f"{p}mlp.gate_proj.weight"]
        found[f"{to}feed_forward.linear_1.weight"] = state[f"{p}mlp.up_proj.weight"]
        found[f"{to}feed_forward.linear_2.weight"] = state[f"{p}mlp.down_proj.weight"]
        found[f"{to}layer_norm_1.weight"] = state[f"{p}input_layernorm.weight"]
        found[f"{to}layer_norm_2.weight"] = state[f"{p}post_attention_layernorm.weight"]
    found["encoder.layer_norm.weight"] = state["model.norm.weight"]
    found["target.lm.output_layer.weight"] = state["lm_head.weight"]
    return found


def write(folder: Path, state, cfg, embed="embedding.word.embedding", **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tencent(state, cfg, embed), folder / "chatllama.bin")
    stated = {
        "emb_size": cfg["hidden_size"], "feedforward_size": cfg["intermediate_size"], "hidden_size": cfg["hidden_size"],
        "heads_num": cfg["num_attention_heads"], "layers_num": cfg["num_hidden_layers"], "max_seq_length": 1024,
        "rotary_position_embedding": True, "layernorm": "rms", "feed_forward": "gated", **more,
    }  # fmt: skip
    (folder / "7b_config.json").write_text(json.dumps(stated))
    return folder


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]), st.integers(33, 61),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(["embedding.word.embedding", "embedding.word_embedding"]),
)  # fmt: skip
def test_read_bit_for_bit(heads, head_dim, vocab, dtype, embed):
    cfg = config(heads, heads, head_dim, ffn=24, vocab=vocab)
    state = state_of(cfg, dtype)
    with TemporaryDirectory() as scratch:
        folder = write(Path(scratch), state, cfg, embed)
        for where in (folder, folder / "chatllama.bin"):
            read = llmkit.open_checkpoint(where)
            assert read.layout == "tencentpretrain"
            assert read.config["max_position_embeddings"] == 1024
            same(read, state)
        assert "7b_config.json" not in llmkit.open_checkpoint(folder).files


def test_logits_and_a_config_beside(tmp_path):
    cfg = config(4, 4, 8)
    state = state_of(cfg)
    write(tmp_path, state, cfg)
    (tmp_path / "config.json").write_text(json.dumps(cfg))  # it states the epsilon, which theirs does not
    ids = torch.tensor([1, 5, 9, 2])
    want = meta_logits(state, cfg, ids)
    found = llmkit.load_decoder(llmkit.open_checkpoint(tmp_path), dtype="float32")(ids[None])[0]
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layers_num": 3}, "layers_num is 3, the tensors have 2"),
        ({"feedforward_size": 11008}, "feedforward_size is 11008, the tensors have 48"),
        ({"emb_size": 64}, "emb_size is 64, the tensors have 32"),
    ],
)
def test_sizes_that_contradict_the_tensors(tmp_path, more, message):
    cfg = config(4, 4)
    with pytest.raises(InputError) as caught:
        llmkit.open_checkpoint(write(tmp_path, state_of(cfg), cfg, **more))
    assert caught.value.message == f"{tmp_path / '7b_config.json'}: {message}"
    assert caught.value.hint == "give the JSON of this model"


def test_two_descriptions(tmp_path):
    cfg = config(4, 4)
    write(tmp_path, state_of(cfg), cfg)
    (tmp_path / "13b_config.json").write_bytes((tmp_path / "7b_config.json").read_bytes())
    with pytest.raises(InputError, match=r"holds 2 descriptions of TencentPretrain: 13b_config.json, 7b_config.json"):
        llmkit.open_checkpoint(tmp_path)
