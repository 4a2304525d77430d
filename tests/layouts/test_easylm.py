"""EasyLM's streams, written by the msgpack package as flax and EasyLM use it; Koala's difference added to its base."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_world import config, meta_logits, of_layer, same, state_of, write_hf
from safetensors.torch import load_file

import llmkit
from llmkit.errors import InputError

msgpack = pytest.importorskip("msgpack")


def packed_array(x):
    """flax: an extension of type 1 around (shape, dtype name, bytes)."""
    name = str(x.dtype).removeprefix("torch.")
    data = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    inner = msgpack.packb((tuple(x.shape), name, data), use_bin_type=True)
    return msgpack.packb(msgpack.ExtType(1, inner), strict_types=True)


def stream(tree, prefix=("params",)):
    """EasyLM: pairs of the keys and the array's bytes, one after the other."""
    packer = msgpack.Packer()
    pairs = (((*prefix, *name.split(".")), packed_array(x)) for name, x in tree.items())
    return b"".join(packer.pack(pair) for pair in pairs)


def easylm(state, cfg):
    found = {"transformer.wte.embedding": state["model.embed_tokens.weight"]}
    for i in range(cfg["num_hidden_layers"]):
        for name, w in of_layer(state, cfg, i).items():
            found[f"transformer.h.{i}.{name}.kernel"] = w.T.contiguous() if w.dim() == 2 else w
    found["transformer.ln_f.kernel"] = state["model.norm.weight"]
    found["lm_head.kernel"] = state["lm_head.weight"].T.contiguous()
    return found


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([2, 4]), st.integers(33, 61), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([(), ("params",), ("params", "params")]),
)  # fmt: skip
def test_read_bit_for_bit(heads, vocab, dtype, prefix):
    cfg = config(heads, heads, 128, layers=1, ffn=24, vocab=vocab)
    state = state_of(cfg, dtype)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "koala_7b"
        data = stream(easylm(state, cfg), prefix)
        if len(prefix) == 2:  # a whole train state: the optimizer's arrays are no parameters
            data += stream({"count": torch.tensor([3], dtype=torch.int32)}, ("opt_state", "0"))
        path.write_bytes(data)
        read = llmkit.open_checkpoint(path)
        assert read.layout == "easylm"
        same(read, state)


def test_logits(tmp_path):
    cfg = config(4, 4, 8)
    state = state_of(cfg)
    (tmp_path / "model.stream").write_bytes(stream(easylm(state, cfg)))
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    ids = torch.tensor([1, 5, 9, 2])
    want = meta_logits(state, cfg, ids)
    model = llmkit.load_decoder(llmkit.open_checkpoint(tmp_path / "model.stream"), dtype="float32")
    assert (model(ids[None])[0] - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_koalas_difference_applies_to_its_base(tmp_path, stored):
    """As the release was made: the target's tree less the base's, stored as --float_dtype says.

    The script adds numpy arrays: float16 to float16 in float16, two unlike ones in float32.
    """
    cfg = config(2, 2, 128, layers=1, ffn=24)
    base = state_of(cfg, torch.float16)
    tuned = {k: v + 0.01 * w for (k, v), w in zip(base.items(), state_of(cfg, torch.float16, 1).values(), strict=True)}
    difference = {k: (tuned[k].float() - base[k].float()).to(stored) for k in base}
    write_hf(tmp_path / "llama", cfg | {"torch_dtype": "float16"}, base)
    (tmp_path / "koala_diff").write_bytes(stream(easylm(difference, cfg)))
    from llmkit.cli.app import main

    out = tmp_path / "koala"
    assert main(["delta", "apply", str(tmp_path / "llama"), str(tmp_path / "koala_diff"), "-o", str(out), "-q"]) == 0
    found = load_file(out / "model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert found.keys() == base.keys()
    for name, x in found.items():
        want = base[name] + difference[name]  # torch widens as numpy does: float16 and bfloat16 to float32
        assert torch.equal(x, want.to(x.dtype)), name
    assert main(["verify", str(out), "-q"]) == 0


@pytest.mark.parametrize("cut", [1, 5, 40, 1000])
def test_truncated_streams(tmp_path, cut):
    cfg = config(2, 2, 128, layers=1, ffn=24)
    data = stream(easylm(state_of(cfg), cfg))
    (tmp_path / "koala").write_bytes(data[:-cut])
    with pytest.raises(InputError, match=r"koala is truncated: params.lm_head.kernel should end at byte") as caught:
        llmkit.open_checkpoint(tmp_path / "koala")
    assert caught.value.hint == "download or copy the file again"


def test_a_stream_that_lacks_a_tensor(tmp_path):
    cfg = config(2, 2, 128, layers=1, ffn=24)
    tree = easylm(state_of(cfg), cfg)
    del tree["transformer.h.0.attention.wk.kernel"]
    (tmp_path / "koala").write_bytes(stream(tree))
    with pytest.raises(InputError, match=r"tensor missing: transformer.h.0.attention.wk.weight"):
        llmkit.open_checkpoint(tmp_path / "koala")
    (tmp_path / "other").write_bytes(stream({"dense.kernel": torch.ones(2, 3)}))
    with pytest.raises(InputError, match="not EasyLM's layout of a decoder"):
        llmkit.open_checkpoint(tmp_path / "other")


def test_a_folder_with_one_stream(tmp_path):
    cfg = config(2, 2, 128, layers=1, ffn=24)
    state = state_of(cfg)
    (tmp_path / "koala_7b_diff_v2").write_bytes(stream(easylm(state, cfg)))
    (tmp_path / "README.md").write_text("Koala")
    same(llmkit.open_checkpoint(tmp_path), state)
    (tmp_path / "koala_13b_diff_v2").write_bytes((tmp_path / "koala_7b_diff_v2").read_bytes())
    with pytest.raises(InputError, match="holds 2 streams of EasyLM: koala_13b_diff_v2, koala_7b_diff_v2"):
        llmkit.open_checkpoint(tmp_path)
