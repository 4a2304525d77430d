"""What `quantize --calibration` takes, and what is read where nobody says."""

from __future__ import annotations

import json

import pytest

from llmkit.calibration.self_generated import generated_by
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.tensors.stopped import Stopped, stoppable

SHORT = ("--samples", "2", "--length", "16")


def history(folder):
    return open_checkpoint(folder).history[-1]


def quantized(call, model, out, *args):
    done = call("quantize", model, "--bits", "4", "--group-size", "32", *args, "-o", out)
    assert done.code == 0, done.err
    return history(out)


def test_the_own_text_is_read_below_eight_bits(call, tiny, tmp_path):
    step = quantized(call, tiny, tmp_path / "q", *SHORT)
    assert (step["method"], step["calibration"], step["samples"]) == ("gptq", "llmkit's own text", 2)
    assert len(step["sha256"]) == 64
    done = call("quantize", tiny, "--bits", "8", "-o", tmp_path / "q8")
    assert (done.code, history(tmp_path / "q8")["method"]) == (0, "mse")
    assert "calibration" not in history(tmp_path / "q8")


@pytest.mark.parametrize(("args", "method"), [(["--calibration", "none"], "mse"), (["--method", "rtn"], "rtn")])
def test_none_is_read(call, tiny, tmp_path, args, method):
    step = quantized(call, tiny, tmp_path / "q", *args)
    assert (step["method"], "calibration" in step) == (method, False)


def test_a_model_without_a_tokenizer_is_not_calibrated_and_that_is_said(call, model, tmp_path):
    for path in model.glob("*token*"):
        path.unlink()
    done = call("quantize", model, "--bits", "4", "--group-size", "32", "-o", tmp_path / "q")
    assert (done.code, "not calibrated: model lacks a tokenizer" in done.out + done.err) == (0, True), done.err
    assert history(tmp_path / "q")["method"] == "mse"


def test_what_the_model_writes_itself(call, tiny, tmp_path):
    steps = [quantized(call, tiny, tmp_path / n, "--calibration", "self", *SHORT, "--seed", "3") for n in ("a", "b")]
    assert steps[0] == steps[1]
    assert (steps[0]["calibration"], "sha256" in steps[0]) == ("what the model itself writes", False)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert a == b


def test_a_run_that_is_stopped_stops_the_model_writing(tiny):
    with stoppable(lambda: True), pytest.raises(Stopped):
        generated_by(open_checkpoint(tiny), 1, 16, seed=0, suffix=())


def test_json_lines_and_folders_are_the_texts_that_they_hold(call, tiny, tmp_path):
    texts = [f"t{i} t{i + 1} t{i + 2} " * 60 for i in range(3)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    (folder / "ignored.bin").write_bytes(b"\0")
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text.strip()}) + "\n" for text in texts))
    made = {}
    for name, source in (("folder", folder), ("lines", lines)):
        quantized(call, tiny, tmp_path / name, "--calibration", source, *SHORT)
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["folder"] == made["lines"]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": 1}', '{"prompt": "t1"}', '{"messages": []}', '{"messages": [{"role": "x"}]}']
)
def test_a_line_of_another_form_is_named(call, tiny, tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "t1 t2 " * 200}) + f"\n\n{line}\n")
    done = call("quantize", tiny, "--bits", "4", "--calibration", path, "-o", tmp_path / "q")
    assert (done.code, "x.jsonl, line 3: expected" in " ".join(done.err.split())) == (2, True), done.err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("args", "n"), [([], 256), (["--samples", "2"], 2)])
def test_the_best_method_reads_more_of_the_text(call, tiny, tmp_path, args, n):
    (tmp_path / "x.txt").write_text("t1 t2 t3 t4 " * 1200)
    step = quantized(call, tiny, tmp_path / "q", "--method", "best", "--calibration", tmp_path / "x.txt",
                     "--length", "8", *args)  # fmt: skip
    assert (step["method"], step["samples"]) == ("best", n)


def test_fewer_windows_than_asked_for_are_said(call, tiny, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("t1 t2 t3 t4 " * 60)
    done = call("quantize", tiny, "--bits", "4", "--group-size", "32", "--calibration", path, "--length", "32",
                "-o", tmp_path / "q")  # fmt: skip
    assert done.code == 0, done.err
    assert "windows, 128 were asked for" in " ".join((done.out + done.err).split())
