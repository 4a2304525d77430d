"""Meta's layout: shards made by the published formulas in plain torch, both ways, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_world import config, meta_logits, meta_state, same, state_of, write_hf

import llmkit
from llmkit.errors import InputError, RequirementError
from llmkit.inspection.check import check_output
from llmkit.layouts.params import ffn_size
from llmkit.transforms.convert import convert

COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
SIZES = st.tuples(
    st.sampled_from([(4, 4), (4, 2), (8, 4), (4, 1)]), st.sampled_from([2, 4, 6, 8]), st.integers(33, 61),
    st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)  # fmt: skip


def shards_of(state, cfg, n, by_rows=False):
    """What each of n ranks holds; the last has the remaining rows of the output."""
    found = [{} for _ in range(n)]
    for name, w in meta_state(state, cfg).items():
        if name.endswith(COLUMNS) or (name == "tok_embeddings.weight" and not by_rows):
            pieces = w.chunk(n, 1)
        elif w.dim() == 1:
            pieces = [w] * n
        else:
            share = len(w) // n
            pieces = [w[i * share : (i + 1) * share if i < n - 1 else None] for i in range(n)]
        for shard, piece in zip(found, pieces, strict=True):
            shard[name] = piece.clone()
    return found


def write_meta(folder: Path, state, cfg, n, by_rows=False, **params) -> Path:
    folder.mkdir(parents=True)
    for i, shard in enumerate(shards_of(state, cfg, n, by_rows)):
        torch.save(shard | {"rope.freqs": torch.ones(3)}, folder / f"consolidated.{i:02d}.pth")
    stated = {
        "dim": cfg["hidden_size"], "n_layers": cfg["num_hidden_layers"], "n_heads": cfg["num_attention_heads"],
        "norm_eps": cfg["rms_norm_eps"], "vocab_size": -1,
    }  # fmt: skip
    if cfg["num_key_value_heads"] != cfg["num_attention_heads"]:
        stated["n_kv_heads"] = cfg["num_key_value_heads"]
    (folder / "params.json").write_text(json.dumps(stated | params))
    return folder


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_there_and_back_bit_for_bit(sizes):
    (heads, kv), head_dim, vocab, n, by_rows, dtype = sizes
    if kv % n or (by_rows and vocab % n):
        n = 1
    theta = {"rope_theta": 500000.0} if by_rows else {}
    cfg = config(heads, kv, head_dim, vocab=vocab, ffn=8 * head_dim, **theta)
    state = state_of(cfg, dtype)
    with TemporaryDirectory() as scratch:
        home = Path(scratch)
        source = write_meta(home / "meta", state, cfg, n, by_rows, **theta)
        read = llmkit.open_checkpoint(source)
        assert read.layout == "meta"
        same(read, state)
        assert read.config["intermediate_size"] == 8 * head_dim
        hf = llmkit.open_checkpoint(write_hf(home / "hf", cfg, state))
        llmkit.save(convert(hf, to="meta", model_parallel=n), home / "out")
        for i, want in enumerate(shards_of(state, cfg, n, by_rows)):
            found = torch.load(home / f"out/consolidated.{i:02d}.pth", weights_only=True)
            assert found.keys() == want.keys()
            assert all(torch.equal(found[k], want[k]) and found[k].dtype == want[k].dtype for k in want)
        same(llmkit.open_checkpoint(home / "out"), state)
        llmkit.save(convert(llmkit.open_checkpoint(home / "out"), to="hf"), home / "back")
        assert (home / "back/model.safetensors").read_bytes() == (home / "hf/model.safetensors").read_bytes()
        assert json.loads((home / "back/config.json").read_text()) == cfg
        assert not (home / "back/params.json").exists()
        assert check_output(home / "out").is_ok


def test_the_vocabulary_of_49953_rows_over_two_files(tmp_path):
    cfg = config(2, 2, 4, layers=1, ffn=8, vocab=49953)
    state = state_of(cfg, torch.float16)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state))
    llmkit.save(convert(hf, to="meta", model_parallel=2), tmp_path / "out")
    rows = [
        len(torch.load(tmp_path / f"out/consolidated.0{i}.pth", weights_only=True)["output.weight"]) for i in range(2)
    ]
    assert rows == [24976, 24977]
    same(llmkit.open_checkpoint(tmp_path / "out"), state)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kv", [2, 4])
def test_logits_are_those_of_the_published_computation(tmp_path, kv, n):
    cfg = config(4, kv, vocab=40)
    state = state_of(cfg)
    ids = torch.tensor([3, 9, 27, 1, 14, 2])
    want = meta_logits(state, cfg, ids)
    model = llmkit.load_decoder(llmkit.open_checkpoint(write_meta(tmp_path / "meta", state, cfg, n)), dtype="float32")
    found = model(ids[None])[0]
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "ffn"),
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (6656, 256, None, 17920), (8192, 256, None, 22016),
     (8192, 4096, 1.3, 28672), (4096, 1024, 1.3, 14336), (2048, 256, 1.5, 8192), (16384, 4096, 1.2, 53248)],
)  # fmt: skip
def test_the_published_sizes(dim, multiple_of, multiplier, ffn):
    assert ffn_size(dim, multiple_of, multiplier) == ffn


@pytest.mark.parametrize(
    ("changes", "params"),
    [
        ({}, {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "norm_eps": 1e-5}),
        (
            {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
            {"rope_theta": 500000.0, "use_scaled_rope": True},
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}},
            {"use_scaled_rope": True, "rope_scaling_factor": 32.0},
        ),
        ({"rope_theta": 1000000.0}, {"rope_theta": 1000000.0}),
    ],
)  # fmt: skip
def test_params_say_what_the_config_says(tmp_path, changes, params):
    cfg = config(**changes)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(cfg)))
    llmkit.save(convert(hf, to="meta"), tmp_path / "out")
    found = json.loads((tmp_path / "out/params.json").read_text())
    assert {k: found[k] for k in params} == params
    assert ffn_size(32, found["multiple_of"], found.get("ffn_dim_multiplier")) == 48
    (tmp_path / "out/config.json").unlink()
    back = llmkit.open_checkpoint(tmp_path / "out").config
    assert back.get("rope_scaling") == changes.get("rope_scaling")
    assert back["rope_theta"] == cfg["rope_theta"]


def test_a_tied_head_is_written_out_and_tied_again(tmp_path):
    cfg = config(tie_word_embeddings=True)
    state = state_of(cfg)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state))
    llmkit.save(convert(hf, to="meta"), tmp_path / "out")
    found = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True)
    assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])
    same(llmkit.open_checkpoint(tmp_path / "out"), state)


def test_the_tokenizer_of_the_folder_above_comes_along(tmp_path):
    cfg = config()
    source = write_meta(tmp_path / "LLaMA/7B", state_of(cfg), cfg, 1)
    (tmp_path / "LLaMA/tokenizer.model").write_bytes(b"pieces")
    assert llmkit.open_checkpoint(source).files["tokenizer.model"].read() == b"pieces"


def test_without_params_the_tensors_keep_their_own_names(tmp_path):
    cfg = config()
    source = write_meta(tmp_path / "meta", state_of(cfg), cfg, 1)
    (source / "params.json").unlink()
    assert "tok_embeddings.weight" in llmkit.open_checkpoint(source).tensors


def refused(folder, **kwargs):
    with pytest.raises(InputError) as caught:
        llmkit.open_checkpoint(folder)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("absent", "message"),
    [([1], "consolidated.01.pth missing"), ([3], "consolidated.03.pth missing"),
     ([1, 2], "consolidated.01.pth, consolidated.02.pth missing"), ([0], "consolidated.00.pth missing")],
)  # fmt: skip
def test_a_missing_file_is_named(tmp_path, absent, message):
    cfg = config(4, 4)
    source = write_meta(tmp_path / "meta", state_of(cfg), cfg, 4)
    for i in absent:
        (source / f"consolidated.{i:02d}.pth").unlink()
    error = refused(source)
    assert error.message == f"{source}: the tensors are shares of 4 files: {message}"
    assert error.hint == "download the missing files"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_layers": 3}, "9 tensors missing: layers.2.attention_norm.weight"),
        ({"n_heads": 16, "n_kv_heads": 4}, "has shape [16, 32], expected [8, 32]"),
        ({"vocab_size": 32000}, "vocab_size is 32000, the tensors have 50 rows"),
        ({"multiple_of": 256}, "give feed-forward layers of 256, the tensors have 48"),
        ({"n_heads": "four"}, "n_heads is 'four', expected a positive whole number"),
    ],
)
def test_params_that_contradict_the_tensors(tmp_path, params, message):
    cfg = config()
    error = refused(write_meta(tmp_path / "meta", state_of(cfg), cfg, 1, **params))
    assert message in error.message


def test_a_config_beside_that_is_another_models(tmp_path):
    cfg = config()
    source = write_meta(tmp_path / "meta", state_of(cfg), cfg, 1)
    (source / "config.json").write_text(json.dumps(cfg | {"rms_norm_eps": 1e-6}))
    assert "the config.json beside it tells of another model" in refused(source).message
    assert "eps is 1e-06, here 1e-05" in refused(source).message


def test_shards_of_two_models(tmp_path):
    cfg = config(4, 4)
    source = write_meta(tmp_path / "meta", state_of(cfg), cfg, 2)
    torch.save({"tok_embeddings.weight": torch.ones(2, 2)}, source / "consolidated.01.pth")
    assert "do not hold the same tensors" in refused(source).message


@pytest.mark.parametrize(
    ("changes", "options", "kind", "message"),
    [
        ({"attention_bias": True}, {}, RequirementError, "cannot hold this llama model: attention.qkv_bias is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}, RequirementError, "rope_scaling is 'linear'"),
        ({"head_dim": 16}, {}, RequirementError, "head_dim is 16, here 8"),
        ({}, {"model_parallel": 4}, InputError, "--model-parallel 4: 2 key/value heads do not divide into 4 files"),
        ({}, {"model_parallel": 0}, InputError, "--model-parallel 0"),
    ],
)
def test_what_the_layout_cannot_hold(tmp_path, changes, options, kind, message):
    cfg = config() | changes
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(config())))
    with pytest.raises(kind) as caught:
        convert(hf, to="meta", **options)
    assert message in caught.value.message
    assert caught.value.hint


def test_rows_stay_where_the_model_pairs_dims_as_the_files_do(tmp_path, monkeypatch):
    """A family of the same computation whose own layout is interleaved: nothing is reordered, either way."""
    from dataclasses import replace

    from llmkit.architecture import registry

    cfg = config()
    state = state_of(cfg)
    plain = registry.require(cfg, "test")
    block = replace(plain.block, position=replace(plain.block.position, pairs="interleaved"))
    monkeypatch.setattr(registry, "require", lambda _config, _label: replace(plain, block=block))
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state))
    llmkit.save(convert(hf, to="meta"), tmp_path / "out")
    found = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True)
    assert torch.equal(found["layers.0.attention.wq.weight"], state["model.layers.0.self_attn.q_proj.weight"])
    same(llmkit.open_checkpoint(tmp_path / "out"), state)


def test_a_float32_written_out_is_the_same_number(tmp_path):
    cfg = config(rms_norm_eps=9.999999747378752e-06)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(cfg)))
    assert convert(hf, to="llama2c").container.name == "model.bin"


@pytest.mark.parametrize("n", [1, 2])
def test_a_cast_on_the_way(tmp_path, n):
    cfg = config()
    state = state_of(cfg)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state))
    llmkit.save(convert(hf, to="meta", dtype="float16", model_parallel=n), tmp_path / "out")
    halves = {k: v.half() for k, v in state.items()}
    for i, want in enumerate(shards_of(halves, cfg, n)):
        found = torch.load(tmp_path / f"out/consolidated.{i:02d}.pth", weights_only=True)
        assert all(torch.equal(found[k], want[k]) for k in want)
    read = llmkit.open_checkpoint(tmp_path / "out")
    same(read, halves)
    assert read.config["torch_dtype"] == "float16"


def test_a_quantized_model_is_dequantized(tmp_path):
    from llmkit.checkpoint.quantized import dequantized
    from llmkit.transforms.quantize import quantize

    cfg = config()
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(cfg)))
    llmkit.save(quantize(hf, bits=8), tmp_path / "int8")
    int8 = llmkit.open_checkpoint(tmp_path / "int8")
    llmkit.save(convert(int8, to="meta", model_parallel=2), tmp_path / "out")
    floats = {k: v.load() for k, v in dequantized(int8).tensors.items()}
    same(llmkit.open_checkpoint(tmp_path / "out"), floats)


@pytest.mark.parametrize("size", [10**9, 9000])
def test_from_shards_to_shards(tmp_path, size):
    cfg = config()
    state = state_of(cfg)
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state))
    llmkit.save(convert(hf, to="bin"), tmp_path / "bin", max_shard_size=size)
    llmkit.save(convert(llmkit.open_checkpoint(tmp_path / "bin"), to="meta", model_parallel=2), tmp_path / "meta")
    llmkit.save(convert(llmkit.open_checkpoint(tmp_path / "meta"), to="hf"), tmp_path / "back", max_shard_size=size)
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) == 1) == (size > 10**6)
    same(llmkit.open_checkpoint(tmp_path / "back"), state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", 64 * 10**15),
        ("dim", "64"),
        ("n_layers", True),
        ("n_heads", float("inf")),
        ("n_kv_heads", "two"),
        ("n_kv_heads", -2),
        ("multiple_of", 0),
        ("ffn_dim_multiplier", "x"),
        ("ffn_dim_multiplier", float("nan")),
        ("ffn_dim_multiplier", 1e999),
        ("norm_eps", "x"),
        ("norm_eps", False),
        ("rope_theta", [1]),
        ("rope_theta", 0),
        ("max_seq_len", "long"),
        ("rope_scaling_factor", {}),
    ],
)
def test_values_that_are_no_sizes_are_named(tmp_path, key, value):
    cfg = config(4, 2, 8, 2, ffn_size(32, 1, None))
    more = {"multiple_of": 1, "use_scaled_rope": True, key: value}
    folder = write_meta(tmp_path / "m", state_of(cfg), cfg, 1, **more)
    with pytest.raises(InputError, match=rf"params\.json: {key} is ") as caught:
        llmkit.open_checkpoint(folder)
    assert len(caught.value.message) < 300
