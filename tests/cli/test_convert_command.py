"""`llmkit convert` as a user calls it."""

from __future__ import annotations

import json
import re

import pytest
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


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (("--to", "hf", "--dtype", "bfloat16"), ("--dtype", "float32")),
        (("--to", "gguf"), ("--type", "bf16")),
        (("--to", "gguf", "--type", "bf16"), ("--type", "f32")),
    ],
)
def test_the_dtype_that_is_named_holds_what_overflowed(call, tiny, tmp_path, narrow, wide):
    state = load_file(tiny / "model.safetensors")
    next(x for x in state.values() if x.dim() == 2)[0, 0] = 1e6 if wide[1] == "bf16" else 3.4e38
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in/config.json").write_bytes((tiny / "config.json").read_bytes())
    done = call("convert", tmp_path / "in", *narrow, "-o", tmp_path / "a")
    assert f"; {' '.join(wide)} holds larger ones" in done.err
    again = call("convert", tmp_path / "in", *narrow[:2], *wide, "-o", tmp_path / "b")
    assert again.code == 0
    assert "infinite" not in again.err


def test_a_wrong_layout_leaves_nothing(call, tiny, tmp_path):
    done = call("convert", tiny, "--to", "biin", "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: --to 'biin' is no layout that llmkit writes; expected hf, bin, dense, ")
    assert done.err.endswith("\nhint: did you mean --to bin?\n")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_help_names_every_layout(call):
    from llmkit.transforms.convert import targets

    text = " ".join(call("convert", "--help").out.split())
    for name, target in targets().items():
        assert re.search(rf"(?<![\w-]){name}[:,.] ", text), name
        for option in target.options:
            assert f"--{option.replace('_', '-')} " in text


def test_an_option_of_another_layout(call, tiny, tmp_path):
    done = call("convert", tiny, "--to", "bin", "--model-parallel", "2", "-o", tmp_path / "out")
    assert done.code == 2
    assert done.err.startswith("error: --to bin has no option --model-parallel; it goes with --to meta\n")


def test_a_foreign_layout_serves_every_command(call, tiny, tmp_path):
    """Meta's files, written, then inspected, quantized, compared and run."""
    out = tmp_path / "meta"
    assert call("convert", tiny, "--to", "meta", "--model-parallel", "2", "-o", out).code == 0
    shown = call("inspect", out)
    assert "layout        meta" in shown.out
    assert call("verify", out).code == 0
    assert call("diff", tiny, out).out == "21 tensors compared, 21 equal, 0 with other values\n"
    texts = [call("generate", m, "w1 w2", "--max-tokens", "4", "-q").out for m in (tiny, out)]
    assert texts[0] == texts[1]
    for source, name in ((tiny, "a"), (out, "b")):
        assert call("quantize", source, "--bits", "8", "-o", tmp_path / name).code == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
    assert files[0] == files[1]
    delta = tmp_path / "delta"
    assert call("delta", "make", out, tiny, "-o", delta).code == 0
    assert call("delta", "apply", out, delta, "-o", tmp_path / "back").code == 0
    assert call("diff", tiny, tmp_path / "back").code == 0


def test_damaged_layouts_are_refused_by_every_command(call, tiny, tmp_path):
    meta, out = tmp_path / "meta", tmp_path / "out"
    assert call("convert", tiny, "--to", "meta", "--model-parallel", "2", "-o", meta).code == 0
    (meta / "consolidated.01.pth").rename(tmp_path / "kept")
    for command in (["quantize", meta, "--bits", "8", "-o", out], ["convert", meta, "--to", "hf", "-o", out],
                    ["inspect", meta], ["generate", meta, "w1"]):  # fmt: skip
        done = call(*command)
        assert (done.code, done.out) == (2, ""), command
        assert done.err == (
            f"error: {meta}: the tensors are shares of 2 files: consolidated.01.pth missing\n"
            "hint: download the missing files\n"
        )
        assert not out.exists()
    data = (tmp_path / "kept").read_bytes()
    (meta / "consolidated.01.pth").write_bytes(data[:-200])
    done = call("convert", meta, "--to", "hf", "-o", out)
    assert done.code == 2
    assert "consolidated.01.pth is truncated or damaged" in done.err
    assert not out.exists()
    call("convert", tiny, "--to", "llama2c", "-o", tmp_path / "c")
    path = tmp_path / "c/model.bin"
    path.write_bytes(path.read_bytes()[:-1])
    done = call("convert", tmp_path / "c", "--to", "hf", "-o", out, "--json")
    assert done.code == 2
    assert done.document["error"]["kind"] == "input"
    assert done.document["error"]["hint"] == "download or export it again"
    assert not out.exists()


def test_options_that_do_not_fit_leave_nothing(call, tiny, tmp_path):
    for options, message, hint in (
        (["meta", "--model-parallel", "3"], "--model-parallel 3: 4 heads do not divide into 3 files",
         "--model-parallel 1 or 2 fits"),
        (["llama2c", "--file-version", "4"], "--file-version 4: llama2.c has versions 0, 1 and 2", "--file-version 1"),
    ):  # fmt: skip
        done = call("convert", tiny, "--to", *options, "-o", tmp_path / "out")
        assert done.code == 2
        assert done.err == f"error: {message}\nhint: {hint}\n"
        assert list(tmp_path.iterdir()) == []
