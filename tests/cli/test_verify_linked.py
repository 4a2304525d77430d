"""`llmkit verify` of an export whose weights are the source's own files."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("onnx")


pytestmark = pytest.mark.usefixtures("hard_links")


@pytest.fixture
def large(model):
    """One whose weights are a file of more than 64 MiB."""
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(2**18, 64)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config |= {"vocab_size": 2**18, "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def exported(call, model, tmp_path):
    assert call("export", model, "--to", "onnx", "--no-check", "-o", tmp_path / "out").code == 0
    return tmp_path / "out"


def change_byte(path, at=-9):
    """One bit, in place; the time of change is put back, as damage of a disk leaves it."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_sound(call, exported):
    found = call("verify", exported, "--json")
    assert found.code == 0
    assert found.document["ok"]
    assert found.document["notes"] == []
    nbytes = {p.name: p.stat().st_size for p in exported.iterdir()}
    assert found.document["nbytes"] == sum(nbytes.values()) - nbytes["llmkit.json"]  # every byte was read


def test_a_changed_byte(call, model, exported):
    change_byte(model / "model.safetensors")
    found = call("verify", exported)
    assert found.code == 1
    wanted = f"model.safetensors (shared with {model}/model.safetensors) was changed: its content has another hash"
    assert wanted in found.out.replace("\n", " ")
    assert found.err == (
        f"{exported} is not as it was written: 1 difference\n"
        "hint: make it again from a source that is sound; --weights copy shares nothing\n"
    )


def test_a_truncated_file(call, model, exported):
    size = (model / "model.safetensors").stat().st_size
    os.truncate(model / "model.safetensors", size - 1000)
    found = call("verify", exported, "--json")
    assert found.code == 1
    assert f"model.safetensors is {size - 1000} bytes long, expected {size}" in found.document["problems"]


def test_a_missing_file(call, model, exported):
    (exported / "model.safetensors").unlink()
    found = call("verify", exported, "--json")
    assert found.code == 1
    assert "model.safetensors is missing" in found.document["problems"]
    assert (model / "model.safetensors").exists()


def test_what_was_not_hashed_is_told_by_its_time(call, large, tmp_path):
    """--no-check does not read large files."""
    out = tmp_path / "out"
    assert call("export", large, "--to", "onnx", "--no-check", "-o", out).code == 0
    found = call("verify", out, "--json")
    assert found.code == 0
    assert found.document["notes"] == [
        f"model.safetensors (shared with {large}/model.safetensors) was not hashed (--no-check): size and time are "
        "those of the export"
    ]
    change_byte(large / "model.safetensors")
    os.utime(large / "model.safetensors")
    found = call("verify", out, "--json")
    assert found.code == 1
    assert found.document["problems"] == [
        f"model.safetensors (shared with {large}/model.safetensors) may have been changed: its time is not that of the "
        "export, which hashed nothing"
    ]


def test_a_manifest_of_an_earlier_llmkit(call, exported):
    manifest = json.loads((exported / "llmkit.json").read_text())
    entry = manifest["files"]["model.safetensors"]
    manifest["files"]["model.safetensors"] = {"nbytes": entry["nbytes"], "linked": entry["linked"], "copied": False}
    manifest["run"] = {"elapsed_s": 1.0}
    (exported / "llmkit.json").write_text(json.dumps(manifest))
    found = call("verify", exported, "--json")
    assert found.code == 0
    assert "holds no hash of itself" in found.document["notes"][0]
    assert "was not hashed: only its size is known" in found.document["notes"][1]


@pytest.mark.slow
def test_a_checked_export_is_hashed_whatever_its_size(call, large, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    assert call("export", large, "--to", "onnx", "-o", out).code == 0
    assert "xxh3" in json.loads((out / "llmkit.json").read_text())["files"]["model.safetensors"]
    change_byte(large / "model.safetensors")
    assert call("verify", out).code == 1
