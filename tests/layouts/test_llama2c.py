"""llama2.c's three versions: files packed by struct and plain torch as export.py orders them, both ways."""

from __future__ import annotations

import json
import struct
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
from llmkit.transforms.convert import convert

MATRICES = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
FFN = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
SIZES = st.tuples(
    st.sampled_from([(4, 4), (4, 2), (6, 3)]), st.sampled_from([2, 4, 8]), st.integers(33, 50),
    st.sampled_from([40, 48]), st.booleans(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)  # fmt: skip


def q8(w, group):
    """export.py's quantize_q80, with zeros kept."""
    flat = w.float().reshape(-1, group)
    scale = flat.abs().max(dim=1).values / 127.0
    q = torch.round(flat / torch.where(scale > 0, scale, torch.ones(()))[:, None]).to(torch.int8)
    return q, scale


def packed(state, cfg, version, group=64):
    m, n = meta_state(state, cfg), cfg["num_hidden_layers"]
    tied = cfg["tie_word_embeddings"]
    sizes = [cfg["hidden_size"], cfg["intermediate_size"], n, cfg["num_attention_heads"], cfg["num_key_value_heads"]]
    v, length = cfg["vocab_size"], cfg["max_position_embeddings"]

    def floats(x):
        return x.float().contiguous().numpy().tobytes()

    def layers(name):
        return [m[f"layers.{i}.{name}.weight"] for i in range(n)]

    if version == 0:
        out = struct.pack("7i", *sizes, v if tied else -v, length) + floats(m["tok_embeddings.weight"])
        for name in ("attention_norm", *MATRICES, "ffn_norm", *FFN):
            out += b"".join(map(floats, layers(name)))
        d = cfg["hidden_size"] // cfg["num_attention_heads"]
        angles = torch.outer(torch.arange(length).double(), 10000.0 ** (-torch.arange(0, d, 2).double() / d))
        out += floats(m["norm.weight"]) + floats(angles.cos()) + floats(angles.sin())
        return out + (b"" if tied else floats(m["output.weight"]))
    out = struct.pack("I", 0x616B3432) + struct.pack("i", version) + struct.pack("7i", *sizes, v, length)
    out += struct.pack("B", int(tied))
    out += struct.pack("i", group) if version == 2 else b""
    out += b"\0" * (256 - len(out))
    norms = layers("attention_norm") + layers("ffn_norm") + [m["norm.weight"]]
    matrices = [m["tok_embeddings.weight"], *(w for name in (*MATRICES, *FFN) for w in layers(name))]
    matrices += [] if tied else [m["output.weight"]]
    out += b"".join(map(floats, norms))
    for w in matrices:
        if version == 1:
            out += floats(w)
        else:
            q, scale = q8(w, group)
            out += q.numpy().tobytes() + floats(scale)
    return out


def group_of(dim):
    group = 64
    while dim % group:
        group //= 2
    return group


def rounded(state, cfg, group):
    """What version 2 keeps of the weights; q and k are quantized in Meta's row order, row by row."""
    found = {}
    for name, w in state.items():
        if w.dim() == 1:
            found[name] = w.float()
        else:  # groups divide rows here, so the order of rows does not matter
            q, scale = q8(w, group)
            found[name] = (q.float() * scale[:, None]).view(w.shape)
    return found


@settings(max_examples=15, deadline=None)
@given(SIZES, st.sampled_from([0, 1, 2]))
def test_there_and_back(sizes, version):
    (heads, kv), head_dim, vocab, ffn, tied, dtype = sizes
    cfg = config(heads, kv, head_dim, vocab=vocab, ffn=ffn, tie_word_embeddings=tied, max_position_embeddings=24)
    state = state_of(cfg, dtype)
    group = group_of(cfg["hidden_size"])
    want = packed(state, cfg, version, group)
    floats = {k: v.float() for k, v in state.items()}
    with TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / "theirs").mkdir()
        (home / "theirs/stories.bin").write_bytes(want)
        hf = llmkit.open_checkpoint(write_hf(home / "hf", cfg, state))
        llmkit.save(convert(hf, to="llama2c", file_version=version), home / "out")
        found = (home / "out/model.bin").read_bytes()
        if version == 0:  # the tables are computed by another program: a unit in the last place
            at = want.index(packed_norm(state))
            n = 24 * head_dim // 2 * 4 * 2
            near(found[at:][:n], want[at:][:n])
            found, want = found[:at] + found[at + n :], want[:at] + want[at + n :]
        assert found == want
        for path in (home / "theirs", home / "theirs/stories.bin", home / "out"):
            read = llmkit.open_checkpoint(path)
            assert read.layout == "llama2c"
            if version == 2 and ffn % group == 0:
                same(read, rounded(state, cfg, group))
            elif version < 2:
                same(read, floats)
            assert read.config["tie_word_embeddings"] is tied
        if version < 2:
            llmkit.save(convert(llmkit.open_checkpoint(home / "out"), to="hf"), home / "back")
            same(llmkit.open_checkpoint(home / "back"), floats)
        assert check_output(home / "out").is_ok


def packed_norm(state):
    """The final norm, which comes right before the tables: the search for them begins behind it."""
    return state["model.norm.weight"].float().numpy().tobytes()


def near(found, want):
    a, b = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (found, want))
    assert (a - b).abs().max() <= 1e-6


def test_groups_that_cross_rows(tmp_path):
    """The feed-forward size is no multiple of the group: rows of w2 are quantized across their ends."""
    cfg = config(4, 2, 8, ffn=40, vocab=40, max_position_embeddings=24)
    state = state_of(cfg)
    (tmp_path / "m.bin").write_bytes(packed(state, cfg, 2, 32))
    read = llmkit.open_checkpoint(tmp_path / "m.bin")
    q, scale = q8(state["model.layers.1.mlp.down_proj.weight"], 32)
    assert torch.equal(
        read.tensors["model.layers.1.mlp.down_proj.weight"].load(), (q.float() * scale[:, None]).view(32, 40)
    )


@pytest.mark.parametrize("version", [0, 1])
def test_logits_are_those_of_the_published_computation(tmp_path, version):
    cfg = config(4, 2, vocab=40, max_position_embeddings=32)
    state = state_of(cfg)
    (tmp_path / "m.bin").write_bytes(packed(state, cfg, version))
    ids = torch.tensor([3, 9, 27, 1, 14, 2])
    want = meta_logits(state, cfg, ids)
    model = llmkit.load_decoder(llmkit.open_checkpoint(tmp_path / "m.bin"), dtype="float32")
    assert (model(ids[None])[0] - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_is_cut_or_too_long(tmp_path):
    cfg = config(max_position_embeddings=24)
    whole = packed(state_of(cfg), cfg, 1)
    for data, hint in (
        (whole[:-4], "download or export it again"),
        (
            whole + b"1234",
            "give a file that llama2.c's export.py wrote, or that `llmkit convert MODEL --to llama2c -o OUT` did",
        ),
    ):
        (tmp_path / "m.bin").write_bytes(data)
        with pytest.raises(InputError) as caught:
            llmkit.open_checkpoint(tmp_path / "m.bin")
        expected = f"dim 32, 2 layers) needs {len(whole)} bytes, the file has {len(data)}"
        assert caught.value.message.endswith(expected)
        assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:4] + struct.pack("i", 3) + h[8:], "llama2.c version 3; versions 0, 1 and 2 are read"),
        (lambda h: h[:8] + struct.pack("i", -32) + h[12:], "the header is damaged"),
        (lambda h: h[:20] + struct.pack("i", 5) + h[24:], "the header is damaged"),
    ],
)
def test_a_wrong_header(tmp_path, change, message):
    cfg = config(max_position_embeddings=24)
    (tmp_path / "m.bin").write_bytes(change(packed(state_of(cfg), cfg, 1)))
    with pytest.raises(InputError, match=message):
        llmkit.open_checkpoint(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("changes", "options", "kind", "message"),
    [
        ({"rms_norm_eps": 1e-6}, {}, RequirementError, "norm.eps is 1e-06, here 1e-05"),
        ({"rope_theta": 500000.0}, {}, RequirementError, "theta is 500000.0, here 10000.0"),
        ({}, {"file_version": 3}, InputError, "--file-version 3: llama2.c has versions 0, 1 and 2"),
    ],
)
def test_what_the_layout_cannot_hold(tmp_path, changes, options, kind, message):
    cfg = config() | changes
    hf = llmkit.open_checkpoint(write_hf(tmp_path / "hf", cfg, state_of(cfg)))
    with pytest.raises(kind) as caught:
        convert(hf, to="llama2c", **options)
    assert message in caught.value.message


def test_a_config_beside_gives_what_the_header_does_not(tmp_path):
    cfg = config(max_position_embeddings=24)
    (tmp_path / "m.bin").write_bytes(packed(state_of(cfg), cfg, 0))
    (tmp_path / "config.json").write_text(json.dumps(cfg | {"eos_token_id": 7}))
    assert llmkit.open_checkpoint(tmp_path / "m.bin").config["eos_token_id"] == 7
    (tmp_path / "config.json").write_text(json.dumps(cfg | {"vocab_size": 51}))
    with pytest.raises(InputError, match="tells of another model: vocab is 51, here 50"):
        llmkit.open_checkpoint(tmp_path / "m.bin")
