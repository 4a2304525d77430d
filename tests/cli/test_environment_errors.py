"""What arguments, streams, memory and the file system refuse is never called a bug, and nothing odd is printed."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli.app import main
from llmkit.cli.environment_errors import as_refusal
from llmkit.cli.output import Mode, Output
from llmkit.cli.terminal import clean, clean_json, clean_stream


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_said(error: BaseException) -> None:
    refusal = as_refusal(error)
    assert refusal is not None
    assert "memory" in refusal.message
    assert refusal.exit_code == 2


def test_memory_is_found_behind_another_error() -> None:
    outer = KeyError("x")
    outer.__cause__ = MemoryError()
    assert as_refusal(outer) is not None
    assert as_refusal(KeyError("x")) is None


def test_what_the_tokenizers_library_refuses_is_no_bug() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(Exception, match="UNK") as caught:
        Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).encode("b")
    refusal = as_refusal(caught.value)
    assert refusal is not None
    assert "tokenizer files: WordLevel error" in refusal.message


@pytest.mark.parametrize("code", [errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENOSPC])
def test_the_file_system_refuses(code: int) -> None:
    refusal = as_refusal(OSError(code, os.strerror(code), "some/file"))
    assert refusal is not None
    assert "some/file" in refusal.message


def test_the_limit_of_open_files_is_the_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Where a reader met it as well, whose own hint is about its file."""
    (tmp_path / "config.json").write_text("{}")
    refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "some/file")
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(refused))
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: (_ for _ in ()).throw(refused))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (16, 4096))
    assert main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Too many open files" in said
    assert "hint: raise the limit, which is 16: ulimit -n 4096" in said


def test_an_argument_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", os.fsdecode(b"a\xffb")]) == 2
    assert "argument 2 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["verify", ""], "argument 2"),
        (["plugins", "check", ""], "argument 3"),
        (["export", "m", "--attention", "", "-o", "o"], "--attention"),
        (["quantize", "m", "--calibration=", "-o", "o"], "--calibration"),
    ],
)
def test_an_unset_variable_is_no_folder_and_no_name(line, named, capsys) -> None:
    assert main(line) == 2
    assert (
        f"error: {named} is empty\nhint: leave it out, or give a value; is a variable unset?" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "option", ["--bits=4 --group-size=", "--target-size=", "--bits=8 --calibration=none --max-shard-size="]
)
def test_numbers_of_thousands_of_digits_are_refused(tiny, tmp_path: Path, option, capsys) -> None:
    assert main(["quantize", str(tiny), "-o", str(tmp_path / "o"), *f"{option}{'9' * 5000}".split()]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_names_that_no_file_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for model in ("x" * 5000, str(tmp_path / "loop"), str(tmp_path / "pipe"), "/dev/zero", "a\0b"):
        for command in (["inspect", model], ["verify", model], ["explain", model, "t"], ["diff", model, model]):
            assert main(command) == 2, command
            assert "error:" in capsys.readouterr().err


def test_control_characters_are_spelt_out() -> None:
    assert clean("a\x1b[31mb\x9b\u202e\ud800\n") == "a\\x1b[31mb\\x9b\\u202e\\ud800\n"
    assert clean("a\nb", is_line=True) == "a\\nb"
    document = clean_json(json.dumps({"a": "\x1b\x9b\u202e"}, ensure_ascii=False))
    assert document.isascii()
    assert json.loads(document) == {"a": "\x1b\x9b\u202e"}


def test_answers_and_messages_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(Mode.HUMAN)
    out.line("\x1b[1m")
    out.record({"name": "\x07"})
    out.table(["a"], [["b\nc\r"]])
    out.warning("w\x1b\nhint: run this")
    out.error("input", "e\x9b")
    Output(Mode.JSON).answer({"a": "\x9b"}, lambda: None)
    clean_stream(sys.stderr).write("a library's\x1b]0;title\x07\n")
    found = capsys.readouterr()
    assert not set(found.out + found.err) & set("\x1b\x07\x9b\r")
    assert "b\\nc" in found.out
    assert "\nhint: run" not in found.err


@pytest.mark.parametrize(
    "line",
    ["inspect ~nobody0/m", "perplexity M --text ~nobody0/t", "lora merge M ~nobody0/a -o O", "report ~nobody0/r.json",
     "eval M --bench mini --data ~nobody0/d", "quantize M --bits 4 --recipe ~nobody0/r.yaml -o O"],
)  # fmt: skip
def test_the_home_of_nobody_is_a_path_that_is_not_there(tiny, tmp_path, line, capfd) -> None:
    words = {"M": str(tiny), "O": str(tmp_path / "out")}
    assert main([words.get(word, word) for word in line.split()]) == 2
    assert "~nobody0/" in capfd.readouterr().err


def test_a_path_behind_an_equals_sign_begins_at_home(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["convert", str(tiny), "--to", "hf", "-q", "--output=~/out"]) == 0
    assert (tmp_path / "out/config.json").is_file()


def test_streams_that_are_closed_or_full(tmp_path: Path) -> None:
    program = f"{sys.executable} -m llmkit"
    cases = {
        "plugins list >&-": 2,
        "plugins list --json >&-": 2,
        "--help >&-": 2,
        "inspect nope 2>&-": 2,
        "--version > /dev/full": 2,
        "inspect nope 2> /dev/full": 2,
    }
    for words, code in cases.items():
        line = f"{program} {words}"
        made = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert made.returncode == code, (line, made)
        assert "Traceback" not in made.stdout + made.stderr
        assert "2>" in line or made.stderr.startswith("error: cannot write")
        assert "2>" in line or "\nhint: " in made.stderr


def test_a_panic_of_tokenizers_is_an_error_of_the_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0}, "a"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$b"), "isolated")
    (tmp_path / "a.txt").write_text("a" * 60)
    made.save(str(tmp_path / "tokenizer.json"))
    assert main(["vocab", "info", str(tmp_path / "tokenizer.json"), "--text", str(tmp_path / "a.txt")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: the tokenizers library stops at the model's tokenizer files: ")  # and no report
    assert "panicked" not in said


def test_the_folder_that_one_is_in_is_gone(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["inspect", "m"]) == 2
    assert "the folder that you are in is not there any more" in capsys.readouterr().err
    assert main(["--version"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_the_command_begins(number: int) -> None:
    program = (
        f"import os, signal, llmkit.cli.app as app\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it\n"
        f"app._commands = lambda: os.kill(os.getpid(), {int(number)})\napp.run()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "error: interrupted; nothing is kept" in done.stderr
