"""What commands may write where, as a user meets it: inputs, single files, what an interrupt keeps."""

from __future__ import annotations

import os
import signal
import time
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmkit.errors import OutputError
from llmkit.pipeline.files import write_file


def test_any_path_that_a_command_names_is_an_input(call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("convert", tiny, "--to", "hf", "-o", "out").code == 0
    Path("out/words.txt").write_text("w1 w2 w3\n" * 50)
    mini = Path(str(files("llmkit_evalsets"))) / "mini/base"
    done = call("vocab", "trim", mini, "--corpus", "out/words.txt", "-o", "out", "--overwrite", "--force")
    assert done.code == 2
    assert "out holds an input (out/words.txt)" in done.err
    assert Path("out/words.txt").exists()
    # options that commands share, too
    plugin = "from llmkit_plugins.llama import ARCHITECTURE\n"
    for name, text, line in (
        ("r.yaml", '"*": 8\n', "quantize {} --calibration none --recipe out/r.yaml"),
        ("words.txt", "w1 w2 w3\n" * 99, "quantize {} --bits 4 --group-size 16 --calibration out/words.txt"),
        ("words.txt", "w1 w2 w3\n" * 99, "quantize {} --bits 8 --method rtn --evaluate out/words.txt"),
        ("p.py", plugin, "convert {} --to hf --plugin out/p.py"),
    ):
        Path("out", name).write_text(text)
        done = call(*line.format(mini).split(), "-o", "out", "--overwrite", "--force")
        assert f"out holds an input (out/{name})" in done.err, line
        assert Path("out", name).read_text() == text
    # a value of an option that names no path is none, though a folder is called so
    Path("float16").mkdir()
    assert call("convert", tiny, "--to", "hf", "--dtype", "float16", "-o", "float16", "--overwrite").code == 0


@pytest.mark.parametrize("name", ["x.gguf", "X.GGUF"])
def test_gguf_named_like_a_file_is_one(call, tiny, tmp_path, name):
    out = tmp_path / name
    done = call("convert", tiny, "--to", "gguf", "--type", "f32", "-o", out)
    assert done.code == 0
    assert f"{out} is one file, without a manifest" in done.err
    assert f"llmkit inspect {out}" in done.err
    found = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    weights = load_file(tiny / "model.safetensors")
    assert np.array_equal(found["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert "already exists" in call("convert", tiny, "--to", "gguf", "-o", out).err
    assert call("convert", tiny, "--to", "gguf", "--type", "f16", "-o", out, "--overwrite").code == 0
    out.write_text("a letter to a friend")
    done = call("convert", tiny, "--to", "gguf", "-o", out, "--overwrite")
    assert done.code == 2
    assert out.read_text() == "a letter to a friend"
    assert call("convert", tiny, "--to", "gguf", "-o", out, "--overwrite", "--force").code == 0


@pytest.mark.parametrize(("to", "name"), [("hf", "x.safetensors"), ("bin", "pytorch_model.bin"), ("meta", "x.pth")])
def test_a_folder_is_not_named_like_a_file(call, tiny, tmp_path, to, name):
    done = call("convert", tiny, "--to", to, "-o", tmp_path / name)
    assert done.code == 2
    assert "is named like a file, and what is written is a folder" in done.err
    assert not (tmp_path / name).exists()


def test_a_record_takes_no_other_files_place(call, tiny, tmp_path):
    for name, text in (("a.json", '{"format": "mine"}'), ("model.safetensors", "weights"), ("b.json", "[1, 2]")):
        (tmp_path / name).write_text(text)
        done = call("eval", tiny, "--bench", "mini", "-o", tmp_path / name)
        assert done.code == 2
        assert f"{tmp_path / name} already exists and is not a record of llmkit eval" in done.err
        assert (tmp_path / name).read_text() == text


def test_a_single_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "record"

    def is_such(head: bytes) -> bool:
        return head.startswith(b"rec")

    write_file(path, b"rec 1", "a record", is_such)
    write_file(path, b"rec 2", "a record", is_such)
    assert path.read_bytes() == b"rec 2"
    monkeypatch.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left on device") as error:
        write_file(path, b"rec 3", "a record", is_such)
    assert "free some space" in error.value.hint
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["record"]
    assert path.read_bytes() == b"rec 2"
    (tmp_path / "link").symlink_to(path)
    write_file(tmp_path / "link", b"rec 4", "a record", is_such)
    assert (tmp_path / "link").is_symlink()
    assert path.read_bytes() == b"rec 4"


def test_ctrl_c_while_scoring_says_what_is_kept(call, tiny, tmp_path, monkeypatch):
    from llmkit.evaluation import runner
    from llmkit.pipeline.journal import Journal

    out = tmp_path / "run.json"

    def interrupted(*_args, keep, answers, **_options):
        journal = Journal(keep, "digest")
        if answers:
            journal.append({"call": "1", "result": {"reads": [[0, 0, -1.5, True], [1, 0, -2.5, False]]}})
        journal.close()
        raise KeyboardInterrupt

    for answers, said in (
        (False, "interrupted; nothing is kept: the same command starts anew\n"),
        (True, f"interrupted; 2 answers are kept in {out}.answers\nhint: it goes on where it stopped: llmkit eval"),
    ):
        monkeypatch.setattr(runner, "evaluate", lambda *a, answers=answers, **o: interrupted(*a, answers=answers, **o))
        done = call("eval", tiny, "--bench", "mini", "-o", out)
        assert done.code == 130
        assert said in done.err
    assert not out.exists()


@pytest.fixture
def unhandled_signals():
    """As in a terminal: a process that was started in the background or under nohup ignores some."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unhandled_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_an_interrupted_run_had_written_is_said(call, tiny, tmp_path, monkeypatch, number):
    from llmkit.pipeline.commit import Partial

    original, out = Partial.finish, tmp_path / "out"

    def stop(self, *args):
        os.kill(os.getpid(), number)
        time.sleep(10)  # until it comes

    monkeypatch.setattr(Partial, "finish", stop)
    assert call("convert", tiny, "--to", "hf", "--dtype", "bfloat16", "-o", out).code == 130
    monkeypatch.setattr(Partial, "finish", original)
    done = call("convert", tiny, "--to", "hf", "--dtype", "bfloat16", "-o", out)
    assert done.code == 0
    nbytes = sum(t.nbytes for t in load_file(tiny / "model.safetensors").values()) // 2
    assert f"went on from an interrupted run: {nbytes / 1000:.0f} kB were written already" in done.err
