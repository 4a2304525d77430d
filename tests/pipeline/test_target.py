"""What an output may take the place of: nothing is lost that the user did not give up."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llmkit
from llmkit.checkpoint.membership import belongs_to_model, decides_what_opens
from llmkit.errors import InputError, OutputError
from llmkit.pipeline import rename
from llmkit.pipeline.commit import JOURNAL, Partial, finish_earlier
from llmkit.pipeline.journal import Journal, is_journal
from llmkit.pipeline.rename import exchange, rename_new
from llmkit.pipeline.runner import run_plan
from llmkit.pipeline.target import Target, partial_path


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({f"w{i}": torch.arange(6.0) + i for i in range(4)}, tmp_path / "in/model.safetensors")
    return tmp_path / "in"


def without_the_call(monkeypatch):
    """A system whose library has neither renameat2 nor renamex_np."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


def save(source: Path, out: Path, **options):
    return llmkit.save(llmkit.open_checkpoint(source).derive(), out, **options)


@pytest.mark.parametrize(
    ("out", "message", "hint"),
    [
        ("a/b/c", "the folder .*a/b does not exist", "mkdir -p .*a/b"),
        ("file/c", "file is a file, no folder", "choose another -o"),
        ("file/b/c", "file is a file, no folder", "choose another -o"),
        ("link/c", "link is a symbolic link to nowhere, which is not there", "choose another -o"),
        ("loop/b/c", "loop is a symbolic link that leads nowhere", "choose another -o"),
    ],
)
def test_what_stands_where_the_outputs_folder_should(source, tmp_path, out, message, hint):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match=message) as error:
        save(source, tmp_path / out)
    assert re.search(hint, error.value.hint)


def test_a_place_that_is_read_only_is_no_lack_of_space(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OutputError, match="has 0 B free"):
        save(source, tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write where it is not allowed to
    with pytest.raises(OutputError, match=r"is read-only, or may not be written by you") as error:
        save(source, tmp_path / "out")
    assert error.value.hint == "choose another -o, where you may write"


@pytest.mark.parametrize("has_system_call", [True, False])
def test_what_comes_into_being_during_the_run_stays(source, tmp_path, monkeypatch, has_system_call):
    if not has_system_call:
        without_the_call(monkeypatch)
    out = tmp_path / "out"
    original = Partial.finish

    def meanwhile(self, *args):
        out.mkdir()
        (out / "mine.txt").write_text("precious")
        original(self, *args)

    monkeypatch.setattr(Partial, "finish", meanwhile)
    with pytest.raises(OutputError, match="out came into being while it was written") as error:
        save(source, out)
    assert "goes on from here" in error.value.hint
    assert os.listdir(out) == ["mine.txt"]
    (out / "mine.txt").unlink()
    out.rmdir()
    monkeypatch.setattr(Partial, "finish", original)
    manifest = save(source, out)
    assert manifest["run"]["steps_resumed"] == 4  # nothing is computed twice
    assert not partial_path(out).exists()


@pytest.mark.parametrize("has_system_call", [True, False])
def test_renames_that_replace_nothing(tmp_path, monkeypatch, has_system_call):
    if not has_system_call:
        without_the_call(monkeypatch)
    for make in (lambda p: p.write_text("x"), Path.mkdir, lambda p: p.symlink_to("nowhere")):
        (tmp_path / "new").write_text("new")
        make(tmp_path / "there")
        with pytest.raises(FileExistsError):
            rename_new(tmp_path / "new", tmp_path / "there")
        rename_new(tmp_path / "new", tmp_path / "free")
        assert (tmp_path / "free").read_text() == "new"
        assert not (tmp_path / "new").exists()
        for path in (tmp_path / "free", tmp_path / "there"):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


class Library:
    """libSystem of macOS: one call, which the test sees."""

    def __init__(self, code: int) -> None:
        self.calls: list[tuple] = []
        self.code = code

    def renamex_np(self, old, new, flags):
        self.calls.append((old, new, flags.value))
        if self.code == 0:
            os.rename(old, new)
            return 0
        ctypes.set_errno(self.code)
        return -1


def test_macos_has_a_call_of_its_own(tmp_path, monkeypatch):
    import errno

    (tmp_path / "a").write_text("a")
    for code in (0, errno.ENOTSUP, errno.EEXIST):
        library = Library(code)
        monkeypatch.setattr(rename.sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, library=library, **__: library)
        if code == errno.EEXIST:
            with pytest.raises(FileExistsError):
                rename_new(tmp_path / "a", tmp_path / "b")
        elif code == errno.ENOTSUP:
            assert not exchange(tmp_path / "b", tmp_path / "c")
            assert library.calls[0][2] == 2  # RENAME_SWAP
            (tmp_path / "b").rename(tmp_path / "a")
        else:
            rename_new(tmp_path / "a", tmp_path / "b")
            assert library.calls == [(bytes(tmp_path / "a"), bytes(tmp_path / "b"), 4)]  # RENAME_EXCL


@pytest.mark.parametrize(
    ("names", "is_replaced"),
    [
        ([], True),
        (["config.json"], False),
        (["config.json", "src/main.c"], False),
        (["config.json", "model.safetensors", "tokenizer.json", "README.md"], True),
        (["config.json", "model.safetensors", "thesis.txt"], False),
        (["config.json", "model.safetensors", "train.py"], False),
        (["config.json", "model.safetensors", "checkpoint-10/model.safetensors"], False),
        (["llmkit.json", "model.safetensors"], True),
    ],
)
def test_overwrite_replaces_a_model_and_nothing_else(source, tmp_path, names, is_replaced):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    if is_replaced:
        save(source, out, overwrite=True)
        assert sorted(os.listdir(out)) == ["llmkit.json", "model.safetensors"]
        return
    before = sorted(p for p in out.rglob("*"))
    with pytest.raises(OutputError, match="which would be deleted") as error:
        save(source, out, overwrite=True)
    assert f"--overwrite --force deletes all of {out}" in error.value.hint
    assert sorted(p for p in out.rglob("*")) == before
    run_plan(llmkit.plan(llmkit.open_checkpoint(source).derive(), out), overwrite=True, force=True)
    assert sorted(os.listdir(out)) == ["llmkit.json", "model.safetensors"]


def test_what_was_put_into_an_output_of_llmkits_is_not_deleted(source, tmp_path):
    out = tmp_path / "out"
    save(source, out)
    (out / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds notes\.md, which would be deleted"):
        save(source, out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine"


def test_inputs_of_any_kind_are_never_replaced(source, tmp_path, monkeypatch):
    plan = llmkit.plan(llmkit.open_checkpoint(source).derive(), tmp_path / "out")
    save(source, tmp_path / "out")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/corpus.txt").symlink_to(tmp_path / "out/llmkit.json")
    monkeypatch.setattr(  # a file system without cases, or one that is mounted twice
        "llmkit.pipeline.target.identity_of", lambda p: str(p).lower() if p.exists() or p == tmp_path / "OUT" else None
    )
    with pytest.raises(OutputError, match="holds an input"):
        run_plan(plan, overwrite=True, force=True, inputs=[tmp_path / "OUT/llmkit.json"])
    for used in (tmp_path / "out", tmp_path / "out/llmkit.json", tmp_path / "words", tmp_path / "words/corpus.txt"):
        with pytest.raises(OutputError, match="holds an input"):
            run_plan(plan, overwrite=True, force=True, inputs=[used])
    assert (tmp_path / "out/model.safetensors").exists()


def test_the_folder_one_is_in_is_never_replaced(source, tmp_path, monkeypatch):
    (tmp_path / "here/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/deep")
    plan = llmkit.open_checkpoint(source).derive()
    for out in (tmp_path / "here", tmp_path / "here/deep", Path(), Path("..")):
        with pytest.raises(OutputError, match=r"the folder you are in|already exists"):
            run_plan(llmkit.plan(plan, out), overwrite=True, force=True)
    assert (tmp_path / "here/deep").is_dir()


def test_links_in_a_circle_and_names_too_long_are_errors_of_the_user(source, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", tmp_path / ("x" * 250), tmp_path / ("x" * 300)):
        with pytest.raises(OutputError):
            save(source, out, overwrite=True)
    assert (tmp_path / "loop").is_symlink()


def test_an_unfinished_output_that_is_a_link_is_refused(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    partial_path(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"out\.partial is a link"):
        save(source, tmp_path / "out")
    assert not os.listdir(tmp_path / "elsewhere")


def test_an_output_of_its_own_is_not_taken_for_an_unfinished_one(source, tmp_path):
    """`-o out.partial` is a folder of the user's."""
    save(source, partial_path(tmp_path / "out"))
    with pytest.raises(OutputError, match="is not llmkit's unfinished out"):
        save(source, tmp_path / "out")
    assert (partial_path(tmp_path / "out") / "model.safetensors").exists()


def test_killed_between_the_two_renames_where_names_cannot_be_exchanged(source, tmp_path, monkeypatch):
    """The old one is put back, whatever the next command is; then it is replaced as if nothing had been."""
    without_the_call(monkeypatch)
    out = tmp_path / "out"
    save(source, out)
    inode = out.stat().st_ino

    rename_of_the_system = os.rename

    def die(old, new):
        if Path(new) == out:
            raise KeyboardInterrupt
        rename_of_the_system(old, new)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        save(source, out, overwrite=True)
    assert not out.exists()
    monkeypatch.undo()
    assert finish_earlier(Target(out), "another plan") is None
    assert out.stat().st_ino == inode
    save(source, out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_killed_while_the_old_one_is_removed(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save(source, out)

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        save(source, out, overwrite=True)
    assert (out / JOURNAL).exists()
    assert partial_path(out).exists()
    monkeypatch.undo()
    manifest = save(source, out, overwrite=True)
    assert manifest["run"]["steps_resumed"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert sorted(os.listdir(out)) == ["llmkit.json", "model.safetensors"]


@pytest.mark.parametrize("how", ["rewritten", "replaced", "removed"])
def test_an_input_that_changes_during_the_run_is_an_error(source, tmp_path, monkeypatch, how):
    path = source / "model.safetensors"
    original = Partial.finish

    def meanwhile(self, *args):
        data = path.read_bytes()
        if how == "rewritten":
            path.write_bytes(data[:-4] + b"\0\0\0\0")
        else:
            path.unlink()
        if how == "replaced":
            (tmp_path / "other").write_bytes(data)
            os.utime(tmp_path / "other", ns=(0, 0))
            (tmp_path / "other").rename(path)
        original(self, *args)

    monkeypatch.setattr(Partial, "finish", meanwhile)
    with pytest.raises(InputError, match=r"model\.safetensors was changed while it was read"):
        save(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


def test_a_line_that_a_full_disk_cut_short_is_not_joined_with_the_next(source, tmp_path):
    plan = llmkit.plan(llmkit.open_checkpoint(source).derive(), tmp_path / "out")
    partial = Partial(Target(plan.out), plan.digest)
    partial.record("w0", {"tensors": {}, "crc32": {}, "reads": []})
    partial.close()
    journal = partial_path(plan.out) / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"step": "w1"}')  # whole, but for the end of the line
    again = Partial(Target(plan.out), plan.digest)
    assert list(again.done) == ["w0"]
    again.record("w2", {})
    again.close()
    assert list(Partial(Target(plan.out), plan.digest).done) == ["w0", "w2"]


@pytest.mark.parametrize(
    "name",
    ["model.onnx", "chat_template.jinja", "tokenizer.model", "added_tokens.json", "special_tokens_map.json",
     "params.json", "adapter_config.json", "modeling_x.py", "pytorch_model.bin", "model.safetensors.index.json",
     "consolidated.00.pth", "generation_config.json", "quantize_config.json", "model_config.yaml", "tokenizer.bin",
     "flax_model.msgpack", "ggml-model.gguf", "additional_chat_templates", "preprocessor_config.json"],
)  # fmt: skip
def test_what_decides_what_a_folder_opens_as(name):
    assert decides_what_opens(name)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "run.mmlu.json", "loss.png", ".gitattributes", "notes.txt"])
def test_what_does_not(name):
    assert not decides_what_opens(name)


def test_code_of_the_user_is_no_models():
    assert belongs_to_model("modeling_chatglm.py")
    assert not belongs_to_model("train.py")


def test_a_file_that_is_no_journal_is_not_written_over(tmp_path):
    path = tmp_path / "run.json.answers"
    path.write_text("42\n")
    with pytest.raises(OutputError, match="is no journal of llmkit's"):
        Journal(path, "digest")
    assert path.read_text() == "42\n"
    assert not is_journal(path)
    for torn in ("", '{"pl'):  # killed at its first line
        path.write_text(torn)
        assert is_journal(path)
        Journal(path, "digest").close()
        assert path.read_text() == '{"plan": "digest"}\n'


def test_a_device_at_out_is_no_output_to_replace(source, tmp_path):
    """The hint does not name what the next error would refuse."""
    os.mkfifo(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(OutputError) as seen:
            Target(tmp_path / "out", overwrite).check(0)
        assert seen.value.hint == "choose another -o"
