"""`quantize observe`, and `quantize --statistics` with what it kept."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["s.safetensors", "imatrix.gguf", "imatrix.dat"])
def test_observed_once_and_quantized_by_it(call, tiny, tmp_path, text, name):
    file, out = tmp_path / name, tmp_path / "q"
    args = ["--calibration", text, "--samples", "6", "--length", "20"]
    done = call("quantize", "observe", tiny, *args, "-o", file)
    assert done.code == 0, done.err
    assert f"hint: llmkit quantize {tiny} --bits 4 --statistics {file} -o OUT" in done.err
    done = call("quantize", tiny, "--bits", "4", "--statistics", file, "-o", out)
    assert done.code == 0, done.err
    document = call("inspect", out, "--json").document
    assert document["quantization"]
    assert "folder as -o" not in done.err
    assert call("quantize", "observe", tiny, *args, "-o", file, "--overwrite").code == 0
    other = file.with_stem("other")
    other.write_bytes(b"\x20\0\0\0\0\0\0\0{}" + b" " * 5000)  # such as a model's weights
    assert "no " in call("quantize", "observe", tiny, *args, "-o", other, "--overwrite").err
    assert other.stat().st_size == 5010
    refused = call("quantize", tiny, "--bits", "4", "--statistics", file, *args, "-o", tmp_path / "r")
    assert refused.code == 2
    assert "not for a run with --statistics" in refused.err


def test_a_head_has_no_statistics(call, tiny, tmp_path, text):
    """They are of the blocks: it is rounded by what needs none, as beside a text, unless a method was asked for."""
    file, out = tmp_path / "s.safetensors", tmp_path / "q"
    args = ["--calibration", text, "--samples", "6", "--length", "20", "--moments"]
    assert call("quantize", "observe", tiny, *args, "-o", file).code == 0
    args = ["quantize", tiny, "--bits", "4", "--head-bits", "8", "--statistics", file, "-o", out, "--dry-run"]
    done = call(*args)
    assert (done.code, "1 to int8" in done.out) == (0, True), done.out
    done = call(*args, "--method", "gptq-fast")
    assert done.code == 2
    assert "hint: leave --method out" in done.err


def test_a_folder_that_is_called_observe_is_a_model_with_its_path(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("quantize", "./observe", "--bits", "8", "-o", "q")
    assert done.code == 2
    assert "observe" in done.err
    assert "MODEL" in call("quantize", "observe", "--help").out
    assert "--moments" in call("quantize", "observe", "--help").out
    assert "--moments" not in call("quantize", "--help").out
