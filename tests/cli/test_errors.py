"""Exit code, stdout and stderr of what goes wrong: the message, the hint, and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LLMKIT = [sys.executable, "-m", "llmkit"]


def test_wrong_path(call, tmp_path, tiny):
    done = call("inspect", tmp_path / "nope")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {tmp_path / 'nope'}: no such file or folder\nhint: give a model folder, a weight file or a hub id\n"
    )
    near = call("inspect", tiny.parent / "tinny")
    assert near.err.endswith(f"hint: did you mean {tiny}?\n")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("https://huggingface.co/own/m", "given as own/m"),
        ("own/m@main", "given as own/m"),
        ("hf.co/own/m:Q4_K_M", "given as own/m"),
        ("https://huggingface.co/own/m/resolve/main/a/b.gguf", "hf download own/m a/b.gguf"),
        ("file:///tmp/nope", "give the path: /tmp/nope"),
        ("llama3:8b", "give a model folder"),
        ("tests/own/m.gguf", "give a model folder"),
    ],
)
def test_other_spellings_of_a_hub_id_are_told(call, given, hint):
    done = call("inspect", given)
    assert done.code == 2
    assert hint in done.err.partition("hint: ")[2]


def test_a_setting_of_the_hub_that_is_no_number_is_no_bug(tmp_path):
    env = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "x", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "llmkit", "inspect", "nobody0/m"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "invalid literal for int() with base 10: 'x'" in done.stderr


def test_not_a_model(call, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    done = call("inspect", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "holds no weights" in done.err
    other = call("inspect", tmp_path / "notes.txt")
    assert other.code == 2
    assert "neither safetensors nor a torch pickle" in other.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.bin", "is CTranslate2's"),
        ("openvino_model.bin", "is OpenVINO's"),
        ("params_shard_0.bin", "is MLC's"),
        ("rank0.engine", "it is TensorRT's"),
        ("m.nemo", "it is NeMo's"),
        ("m.llamafile", "it is llamafile's"),
    ],
)
def test_what_other_programs_made_is_named(call, tmp_path, name, words):
    (tmp_path / name).write_bytes(b"\x06\0\0\0\x10\0TransformerSpec\0" if name == "model.bin" else b"\xfe" * 99)
    (tmp_path / "config.json").write_text("{}")
    done = call("inspect", tmp_path)
    assert done.code == 2
    assert words in done.err
    assert done.err.endswith("hint: give the model that it was made from\n")
    damaged = tmp_path / "pytorch_model.bin"
    damaged.write_bytes(b"\xfe" * 99)
    assert call("inspect", damaged).err.endswith("hint: it is another program's, or damaged: fetch it again\n")


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        (["models--a--b/snapshots/f0/config.json"], "may lie in its folders", "give F/models--a--b/snapshots/f0"),
        (["snapshots/f0/config.json", "refs/main"], "models may lie in its folders", "give F/snapshots/f0"),
        (["config.json", "model.safetensors.crdownload"], "crdownload is an unfinished download", "fetch it again"),
        (["model.safetensors.part10", "model.safetensors.part9"], "part9 is a piece of a file that was split",
         "cat F/model.safetensors.part9 F/model.safetensors.part10 > F/model.safetensors"),
        (["model.safetensors.zst"], "no model.safetensors", "unpack the archive in it"),
        (["adapter_config.json"], "it holds the config of an adapter", "fetch the adapter's weights"),
        (["data/train.parquet"], "it holds a dataset", "give the folder that holds config.json"),
        (["config.json"], "holds no weights", "config.json is there: fetch the weight files"),
        (["manifest.ocdbt"], "it is Orbax's", "give the model that it was made from"),
    ],
)  # fmt: skip
def test_what_lies_in_the_place_of_weights_is_named(call, tmp_path, names, words, hint):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    done = call("inspect", tmp_path)
    assert done.code == 2
    assert words in done.err
    assert f"hint: {hint}".replace("F/", f"{tmp_path}/") in done.err


def test_truncated_file(call, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = call("inspect", model)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {weights} is truncated: its header promises")
    assert done.err.endswith("hint: download or copy the file again\n")


def test_malicious_pickle(call, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R.")
    done = call("inspect", tmp_path)
    assert done.code == 2
    assert "refuses to load: its pickle wants to run os.system" in done.err
    assert "hint: " in done.err


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["inspct"], "no such command 'inspct'", "did you mean llmkit inspect?"),
        (["plugins", "lst"], "no such command 'lst'", "did you mean llmkit plugins list?"),
        (["zzz"], "no such command 'zzz'", "llmkit --help"),
        (["inspect"], "missing argument 'MODEL'", "llmkit inspect --help"),
        (["inspect", "x", "--tensr"], "no such option: --tensr", "did you mean --tensors?"),
        (["quantize", "x", "--bits", "4"], "missing option '-o' / '--output'", "llmkit quantize --help"),
        (["--vers"], "no such option: --vers", "did you mean --version?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors(call, args, message, hint):
    done = call(*args)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {message}\nhint: {hint}\n"
    as_json = call(*args, "--json")
    assert as_json.code == 2
    assert as_json.err == ""
    assert as_json.document["error"]["kind"] == "usage"


def test_bad_values_are_usage_errors(call, tiny, tmp_path):
    done = call("quantize", tiny, "--bits", "four", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--bits" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("type", "words"), [("fp8", "no such file"), ("int", "none is given"), ("nf4", "has int")])
def test_a_type_says_how_many_bits_it_has(call, type, words):
    done = call("quantize", "./x", "--type", type, "-o", "y")
    assert done.code == 2
    assert words in done.err


def test_bits_or_a_size_are_asked_for_before_the_model_is_opened(call):
    done = call("quantize", "x", "-o", "y")
    assert (done.code, done.err.splitlines()[1]) == (2, "hint: --bits 4")
    assert done.err.startswith("error: none is given; expected one of --bits, --target-bits, --target-size")


def test_no_arguments_prints_help_and_fails(call):
    done = call()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: llmkit")


def test_unknown_tensor_gets_the_nearest_name(call, tiny, tmp_path):
    assert call("quantize", tiny, "--bits", "8", "-o", tmp_path / "out", "-q").code == 0
    done = call("explain", tmp_path / "out", "model.layers.0.self_attn.q_proj.weight_pakced")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {tmp_path / 'out'} has no tensor 'model.layers.0.self_attn.q_proj.weight_pakced'\n"
        "hint: did you mean model.layers.0.self_attn.q_proj.weight_packed?\n"
    )
    done = call("explain", tmp_path / "out", "model.layers.0.self_attn.q_proj.weight")
    assert "has model.layers.0.self_attn.q_proj.weight in a quantized layout, as model.layers" in done.err
    assert done.err.endswith(f"hint: llmkit explain {tmp_path / 'out'} model.layers.0.self_attn.q_proj.weight_packed\n")
    absent = call("explain", tiny, "lm_head.weight")
    assert absent.code == 2
    assert "has no llmkit.json" in absent.err


def test_errors_as_json(call, tmp_path):
    done = call("inspect", tmp_path / "nope", "--json")
    assert (done.code, done.err) == (2, "")
    assert done.document == {
        "error": {
            "kind": "input",
            "message": f"{tmp_path / 'nope'}: no such file or folder",
            "hint": "give a model folder, a weight file or a hub id",
        }
    }


def test_a_bug_leaves_a_crash_file(call, tiny, tmp_path, monkeypatch):
    import tempfile

    import llmkit.checkpoint.checkpoint as opening

    def broken(model):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(opening, "open_checkpoint", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = call("inspect", tiny)
    assert (done.code, done.out) == (3, "")
    assert "sorry, this is a bug in llmkit or a plugin: ZeroDivisionError: boom" in done.err
    assert "Traceback" not in done.err
    (crash,) = tmp_path.glob("llmkit-crash-*.txt")
    assert str(crash) in done.err
    text = crash.read_text()
    assert f"llmkit inspect {tiny}" in text
    assert "Traceback" in text
    assert "torch " in text
    monkeypatch.setenv("LLMKIT_DEBUG", "1")
    assert "Traceback" in call("inspect", tiny).err


def test_debug_shows_the_stack_of_an_expected_error(call, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_DEBUG", "1")
    assert "Traceback" in call("inspect", tmp_path / "nope").err


def test_a_closed_pipe_is_quiet(tiny):
    command = [*LLMKIT, "inspect", str(tiny), "--tensors", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.close()
        err = done.stderr.read()
        assert done.wait() == 0
    assert err == b""


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "line by line"])
@pytest.mark.parametrize("mode", [[], ["--json"]], ids=["human", "json"])
def test_an_answer_that_is_no_is_so_without_a_reader(tiny, tmp_path, mode, unbuffered):
    """`llmkit verify OUT | head -1` under `pipefail`: the reader takes what it wants, and the code stays 1."""
    assert subprocess.run([*LLMKIT, "convert", tiny, "--to", "hf", "-o", tmp_path / "out", "-q"]).returncode == 0
    (tmp_path / "out" / "config.json").write_text("{}")
    command = [*LLMKIT, "verify", str(tmp_path / "out"), *mode]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, **pipes) as done:
        done.stdout.close()
        err = done.stderr.read().decode()
        assert done.wait() == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["generate", "x", "y", "--temperature", "inf"], "--temperature inf"),
        (["generate", "x", "y", "--seed", "9" * 20], "--seed 999"),
        (["perplexity", "x", "--text", "y", "--context", "9" * 20], "--context 999"),
        (["eval", "x", "--bench", "mini", "--limit", "1e400"], "--limit inf"),
        (["quantize", "x", "--target-bits", "inf", "-o", "o"], "--target-bits inf"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_numbers_that_no_library_takes(call, args, option):
    done = call(*args)
    assert done.code == 2
    assert option in done.err.splitlines()[0]
    assert done.err.splitlines()[1:] == [f"hint: llmkit {args[0]} --help"]


@pytest.mark.parametrize("as_json", [False, True], ids=["human", "json"])
def test_ctrl_c_while_writing_says_how_to_resume(tiny, tmp_path, as_json):
    out = tmp_path / "out"
    # The first step that is written says so, and waits to be interrupted.
    script = f"""
import sys, time
from pathlib import Path
from llmkit.pipeline.commit import Partial
def slow(self, step, entry):
    Path({str(tmp_path / "begun")!r}).touch()
    for _ in range(400):
        if Path({str(tmp_path / "interrupted")!r}).exists():
            return
        time.sleep(0.05)
Partial.record = slow
from llmkit.cli.app import main
sys.exit(main())
"""
    args = ["quantize", str(tiny), "--bits", "8", "-o", str(out), *(["--json"] if as_json else [])]
    command = [sys.executable, "-c", script, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        for _ in range(1200):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        (tmp_path / "interrupted").touch()
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in stderr
    resume = f"it goes on where it stopped: llmkit {' '.join(args)}"
    message = f"interrupted; {out}.partial keeps what is done"
    if as_json:
        assert json.loads(stdout)["error"] == {"kind": "interrupted", "message": message, "hint": resume}
    else:
        assert stdout == ""
        assert f"error: {message}\nhint: {resume}\n" in stderr
    assert not out.exists()


def test_existing_output_is_refused_before_any_work(call, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    for more in ([], ["--dry-run"]):
        done = call("quantize", tiny, "--bits", "8", "-o", tmp_path / "out", *more)
        assert (done.code, done.out) == (2, "")
        assert "already exists" in done.err
        assert "--overwrite" in done.err
    assert os.listdir(tmp_path / "out") == []
    assert not Path(f"{tmp_path / 'out'}.partial").exists()


def test_a_full_disk_is_refused_in_the_plan(call, tiny, tmp_path, monkeypatch):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=1000))
    done = call("quantize", tiny, "--bits", "8", "-o", tmp_path / "out")
    assert done.code == 2
    assert "the disk has 1 kB free" in done.err
    assert not (tmp_path / "out").exists()


def test_a_plan_is_shown_although_the_disk_is_too_small(call, tiny, tmp_path, monkeypatch):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=1000))
    args = ("quantize", tiny, "--bits", "8", "--method", "rtn", "--calibration", "none", "-o", tmp_path / "out")
    done = call(*args, "--dry-run")
    assert done.code == 2
    assert "peak memory" in done.out
    assert "needed, 1 kB free" in done.out
    assert done.err.splitlines()[-2].startswith(f"error: {tmp_path / 'out'}: needs ")
    assert done.err.endswith("the disk has 1 kB free\nhint: free some space or choose another -o\n")
    shown = call(*args, "--dry-run", "--json")
    document = json.loads(shown.out)
    assert shown.code == 2
    assert document["write_nbytes"] > 1000
    assert document["error"]["message"].endswith("the disk has 1 kB free")
    assert document["error"]["hint"] == "free some space or choose another -o"
    assert call(*args, "--dry-run", "-q").out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("flaot16", ["float16", "float32"], "float16"),
        ("float61", ["float16", "float32"], "float16"),
        ("int4", ["int8"], None),
        ("q4_1", ["q4_0", "q8_0"], None),
        ("llama3", ["llama", "opt"], "llama"),
    ],
)
def test_another_number_is_no_slip(word, known, found):
    from llmkit.errors import nearest

    assert nearest(word, known) == found


def test_what_is_not_there_is_named_as_that(call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("convert", tiny, "--to", "hf", "-o", "out").code == 0
    for args, message, hint in (
        (["verify", "ouut"], "ouut: no such folder", "did you mean out?"),
        (["explain", "out/config.json", "x"], "out/config.json is no folder, and llmkit.json", "give the folder: out"),
        (["verify", tiny / "config.json"], "config.json is no folder", "llmkit inspect"),
        (["inspect", ""], "argument 2 is empty", "is a variable unset?"),
        (["inspect", "."], "such as out", "give out"),
        (["convert", tiny, "--to", "hf", "--max-shard-size", "0", "-o", "x"], "size '0' holds nothing", "5GB"),
    ):
        done = call(*args)
        assert done.code == 2
        assert message in done.err
        assert hint in done.err
    Path("talk.json").write_text("hello")
    done = call("generate", tiny, "--messages", "talk.json")
    assert "talk.json, line 1 is not valid JSON" in done.err
    assert 'a message is {"role"' in done.err
