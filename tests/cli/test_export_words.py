"""What `llmkit export` says and refuses: links, a source that must stay, interrupts, wrong options."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from llmkit.pipeline import commit

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


pytestmark = pytest.mark.usefixtures("hard_links")


@pytest.fixture
def other_disk(tmp_path):
    folder = Path("/dev/shm") / f"llmkit-{tmp_path.parent.name}-{tmp_path.name}"
    if not folder.parent.is_dir() or folder.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk at /dev/shm")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_linked_is_not_said_to_be_written(call, tiny, tmp_path):
    out = tmp_path / "out"
    done = call("export", tiny, "-o", out, "--no-check")
    assert done.code == 0
    size = (tiny / "model.safetensors").stat().st_size
    written = sum(p.stat().st_size for p in out.iterdir() if p.name not in ("model.safetensors", "llmkit.json"))
    assert f"wrote {out}: {written / 1e3:.3g} kB, linked {size / 1e3:.3g} kB of the source, " in done.out
    assert "weight file" not in done.out
    assert "B/s" not in done.out
    assert done.err.endswith(f"hint: llmkit generate {out} PROMPT\n")


def test_the_document_tells_written_from_shared(call, tiny, tmp_path):
    done = call("export", tiny, "-o", tmp_path / "out", "--no-check", "--json")
    size = (tiny / "model.safetensors").stat().st_size
    source = str(tiny / "model.safetensors")
    assert done.document["shared"] == {"model.safetensors": {"sharing": "hard link", "linked": source, "nbytes": size}}
    assert done.document["nbytes"] == sum(n for f, n in done.document["files"].items() if f != "model.safetensors")


def test_the_plan_of_a_linked_export(call, tiny, tmp_path):
    done = call("export", tiny, "-o", tmp_path / "out", "--dry-run")
    size = f"{(tiny / 'model.safetensors').stat().st_size / 1e3:.3g} kB"
    assert re.search(rf"^shares +{size}: model.safetensors$", done.out, re.M)
    assert re.search(rf"^reads +{size}$", done.out, re.M)  # to hash it
    assert re.search(r"^writes +[\d.]+ kB: 5 small files$", done.out, re.M), done.out
    assert re.search(r"^check +against the torch decoder, which holds the whole model$", done.out, re.M)
    assert "0 B" not in done.out
    document = call("export", tiny, "-o", tmp_path / "out", "--dry-run", "--no-check", "--json").document
    assert document["read_nbytes"] == document["copied_nbytes"] == 0
    assert document["details"]["check"] == "none (--no-check)"


def test_another_disk(call, tiny, other_disk, monkeypatch):
    """Nothing can be shared there: the plan counts the copy, and a disk that is too small is found before the work."""
    size = (tiny / "model.safetensors").stat().st_size
    planned = call("export", tiny, "-o", other_disk / "out", "--dry-run", "--json").document
    assert planned["copied_nbytes"] == planned["linked_nbytes"] == size
    done = call("export", tiny, "-o", other_disk / "out", "--no-check")
    assert f", copied {size / 1e3:.3g} kB from another disk, " in done.out
    usage = shutil.disk_usage(other_disk)._replace(free=2**20 + size)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _path: usage)
    refused = call("export", tiny, "-o", other_disk / "small", "--no-check")
    assert refused.code == 2
    assert refused.err.splitlines()[-2].startswith(f"error: {other_disk / 'small'}: needs ")
    assert refused.err.endswith("hint: free some space or choose another -o\n")
    assert [p.name for p in other_disk.iterdir()] == ["out"]


def test_the_source_of_links_is_never_replaced(call, model, tmp_path):
    """No tensor of it is read, but its files are what the output shares."""
    before = contents(model)
    done = call("export", model, "-o", model, "--overwrite", "--no-check")
    assert done.code == 2
    assert f"error: {model} holds an input ({model}/model.safetensors), which would be deleted\n" in done.err
    assert contents(model) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_is_replaced_not_its_target(call, tiny, model, tmp_path):
    before = contents(model)
    (tmp_path / "out").symlink_to(model)
    done = call("export", tiny, "-o", tmp_path / "out", "--overwrite", "--no-check")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").is_symlink()
    assert contents(model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_the_manifest_finds_the_source_from_anywhere(call, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("export", "model", "-o", "out", "--no-check").code == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.move("out", "elsewhere/out")
    monkeypatch.chdir("elsewhere")
    entry = json.loads(Path("out/llmkit.json").read_text())["files"]["model.safetensors"]
    assert entry["linked"] == str(model / "model.safetensors")
    assert call("verify", "out").out.startswith("out is as it was written: 6 files, ")


def test_interrupted_in_the_check(call, tiny, tmp_path, monkeypatch):
    from llmkit.onnx import parity

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "check_folder", stop)
    out = tmp_path / "out"
    done = call("export", tiny, "-o", out)
    assert done.code == 130
    assert done.err.endswith(
        f"error: interrupted; {out} is written, but not checked\n"
        f"hint: llmkit verify {out} looks at its bytes; with --overwrite it is written and checked again\n"
    )
    assert call("verify", out).code == 0
    assert not (tmp_path / "out.partial").exists()


def test_the_table_of_the_check(call, tiny, tmp_path):
    done = call("export", tiny, "--bits", "8", "-o", tmp_path / "out")
    lines = done.out.splitlines()
    assert lines[1].startswith("logits for random tokens, beside the torch decoder's")
    assert lines[2].split("  ")[0] == "computed"
    assert re.fullmatch(r"prefill +\d\.\de-\d\d +1\.0e-04 +100\.0%", lines[4])
    assert re.fullmatch(r"prefill, int8 activations +\d\.\de-\d\d +- +[\d.]+%", lines[8])
    assert lines[9].startswith("-: what rounding at run time adds.")
    assert lines[10] == "passed: the exported model computes what the torch decoder does"


def test_tokens_that_are_as_likely_are_the_same_choice():
    import torch

    from llmkit.onnx.parity import difference_of

    wanted = torch.tensor([[[5.0, 5.0 - 1e-6, 1.0], [5.0, 4.0, 1.0]]])
    found = torch.tensor([[[5.0 - 1e-6, 5.0, 1.0], [4.0, 5.0, 1.0]]])
    assert difference_of("case", found, wanted).same_choice == 0.5


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        (["--to", "gguf"], "--to 'gguf' is no format that llmkit exports; expected onnx",
         "llmkit convert MODEL --to gguf -o OUT"),
        (["--to", "onxx"], "--to 'onxx' is no format that llmkit exports; expected onnx", "did you mean onnx?"),
        (["--attention", "gqaa"], "--attention 'gqaa' is unknown; expected gqa, flash, attention, mha",
         "did you mean gqa?"),
        (["--bits", "3"], "--bits 3: expected 4 or 8 in onnx", "--bits 4"),
        (["--via", "optinum"], "--via 'optinum' is unknown; expected optimum", "did you mean optimum?"),
        (["--via", "optimum", "--bits", "4"],
         "--bits is not for --via optimum, which traces the model as transformers computes it",
         "leave --bits out"),
    ],
)  # fmt: skip
def test_wrong_options(call, tiny, tmp_path, options, error, hint):
    done = call("export", tiny, *options, "-o", tmp_path / "out")
    assert (done.code, done.err) == (2, f"error: {error}\nhint: {hint}\n")
    assert list(tmp_path.iterdir()) == []


def test_no_config(call, model, tmp_path):
    (model / "config.json").unlink()
    done = call("export", model, "-o", tmp_path / "out")
    assert done.code == 2
    assert done.err == (
        "error: model has no config.json, which says what model it is\n"
        "hint: copy the config.json and the tokenizer that it was published with beside the weights\n"
    )


def test_an_exported_folder_of_integers_is_no_source(call, tiny, tmp_path):
    assert call("export", tiny, "--bits", "4", "-o", tmp_path / "int4", "--no-check").code == 0
    done = call("export", tmp_path / "int4", "-o", tmp_path / "out")
    assert done.code == 2
    assert done.err == (
        "error: int4 is an exported folder, and 16 of its weights were changed for its graph\n"
        f"hint: export the model that it was made from; llmkit inspect {tmp_path}/int4 shows how it was made\n"
    )
    assert not (tmp_path / "out").exists()


def test_without_onnx_runtime_nothing_is_written(call, tiny, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    done = call("export", tiny, "-o", tmp_path / "out")
    assert done.code == 2
    assert done.err == (
        "error: ONNX Runtime, which checks the export, is not installed\n"
        "hint: pip install 'llmkit[cpu]' (or llmkit[gpu]; never both), or --no-check\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert call("export", tiny, "-o", tmp_path / "out", "--no-check").code == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_where_nothing_may_be_written(call, tiny, tmp_path, monkeypatch, number):
    before = Path.mkdir

    def mkdir(path, *args, **options):
        if path.name == "out.partial":
            raise OSError(number, os.strerror(number))
        before(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    done = call("export", tiny, "-o", tmp_path / "out", "--no-check", "--json")
    assert done.code == 2
    assert done.document["error"]["message"] == f"cannot write {tmp_path}/out.partial: {os.strerror(number)}"
    assert done.document["error"]["hint"] == "choose another -o, where you may write"
    assert list(tmp_path.iterdir()) == []


def test_progress_does_not_say_that_links_are_written(call, tiny, tmp_path, monkeypatch):
    from llmkit.cli.output import Output
    from llmkit.pipeline.progress import NO_PROGRESS

    labels = []

    class Seen:
        def begin(self, total, label, unit="B"):
            labels.append((total, label))

        advance, end = NO_PROGRESS.advance, NO_PROGRESS.end

    monkeypatch.setattr(Output, "progress", lambda _self: Seen())
    size = (tiny / "model.safetensors").stat().st_size
    assert call("export", tiny, "-o", tmp_path / "out", "--no-check").code == 0
    assert call("export", tiny, "-o", tmp_path / "copy", "--weights", "copy", "--no-check").code == 0
    assert labels[0] == (size, "hashing")
    assert labels[1][1] == "writing copy"


def test_what_is_shown_of_optimum(call, tiny, tmp_path, monkeypatch):
    """The exporter itself has tests of its own, where it is installed (tests/onnx/test_optimum_runtime.py)."""
    from llmkit.onnx import via
    from llmkit.onnx.parity import Difference

    out, found = tmp_path / "out", [Difference("prefill", 3e-6, 1.0)]
    monkeypatch.setattr(via, "export_by_optimum", lambda *_args, **_options: {"files": {}, "recipe": []})
    monkeypatch.setattr(via, "compare_with_transformers", lambda *_args: found)
    done = call("export", tiny, "--via", "optimum", "-o", out)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[1].startswith("logits for random tokens, beside transformers'; ")
    assert lines[4].split() == ["prefill", "3.0e-06", "1.0e-04", "100.0%"]
    assert lines[5] == "passed: the exported model computes what transformers does"
    out.mkdir()
    found[0] = Difference("prefill", 3e-3, 0.5)
    failed = call("export", tiny, "--via", "optimum", "-o", out)
    assert failed.code == 1
    assert "passed" not in failed.out
    assert failed.err.endswith("the exported model differs from transformers: prefill by 3.0e-03\n")
    assert (out / "PARITY_FAILED").exists()
