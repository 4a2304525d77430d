"""`llmkit convert` as a user calls it."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file


def test_convert_verify_and_generate(call, tiny, tmp_path):
    out = tmp_path / "bin"
    dry = call("convert", tiny, "--to", "bin", "-o", out, "--dry-run")
    assert dry.code == 0
    assert "1 weight file, " in dry.out
    assert "convert to=bin" in dry.out
    assert not out.exists()
    done = call("convert", tiny, "--to", "bin", "-o", out)
    assert done.code == 0
    assert done.out.startswith(f"wrote {out}: ")
    assert call("verify", out).code == 0
    assert call("diff", tiny, out).code == 0
    words = [call("generate", m, "w1 w2", "--max-tokens", "4", "-q").out for m in (tiny, out)]
    assert words[0] == words[1]


def test_overflow_is_reported_and_recorded(call, tiny, tmp_path):
    state = load_file(tiny / "model.safetensors")
    for i, name in enumerate(list(state)[:7]):
        state[name].view(-1)[: 7 - i] = 1e6
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in/config.json").write_bytes((tiny / "config.json").read_bytes())
    args = ("convert", tmp_path / "in", "--to", "hf", "--dtype", "float16")
    done = call(*args, "-o", tmp_path / "out")
    assert done.code == 0
    found = load_file(tmp_path / "out/model.safetensors")
    want = {n: int(x.isinf().sum()) for n, x in found.items() if x.isinf().any()}
    assert sorted(want.values()) == [1, 2, 3, 4, 5, 6, 7]
    first = max(want, key=want.get)
    assert f"warning: 28 values became infinite in float16, in 7 tensors: {first} (7), " in done.err
    assert " and 2 more; --dtype bfloat16 holds larger ones" in done.err
    recorded = json.loads((tmp_path / "out/llmkit.json").read_text())["run"]["overflow"]
    assert recorded == {"total": 28, "tensors": want, "uncounted": []}
    as_json = call(*args, "-o", tmp_path / "again", "--json")
    assert as_json.document["overflow"]["total"] == 28
    quiet = call("convert", tmp_path / "in", "--to", "hf", "--dtype", "bfloat16", "-o", tmp_path / "wide", "--json")
    assert quiet.document["overflow"] == {"total": 0, "tensors": {}, "uncounted": []}
    assert quiet.err == ""
    assert all(torch.isfinite(x).all() for x in load_file(tmp_path / "wide/model.safetensors").values())


def test_a_wrong_layout_leaves_nothing(call, tiny, tmp_path):
    done = call("convert", tiny, "--to", "biin", "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: --to 'biin' is no layout that llmkit writes; expected hf, bin\nhint: did you mean --to bin?\n"
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
