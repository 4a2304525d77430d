"""What `llmkit doctor` says of ONNX Runtime and of extras, for installations that this one is not."""

from __future__ import annotations

import pytest

from llmkit.cli import health


def findings(monkeypatch, **versions):
    known = health.installed_version
    monkeypatch.setattr(health, "installed_version", lambda name: versions.get(name.replace("-", "_"), known(name)))
    return {f.name: f for f in health.examine()}


def test_both_builds_of_onnx_runtime_are_wrong(monkeypatch):
    found = findings(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")["ONNX Runtime"]
    assert found.state == "wrong"
    assert found.text == "onnxruntime and onnxruntime-gpu are both installed, under one import name"
    assert found.remedy.startswith("pip uninstall onnxruntime onnxruntime-gpu")


def test_none_is_a_note(monkeypatch):
    found = findings(monkeypatch, onnxruntime=None, onnxruntime_gpu=None)["ONNX Runtime"]
    assert found.state == "note"
    assert "llmkit[cpu]" in found.remedy


def test_the_one_that_is_here_tells_its_providers(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
    found = findings(monkeypatch)["ONNX Runtime"]
    assert found.state == "ok"
    assert found.text.startswith(f"{onnxruntime.__version__} (onnxruntime")
    assert "CPUExecutionProvider" in found.text


def test_an_extra_that_would_change_what_is_here_goes_elsewhere(monkeypatch):
    found = findings(monkeypatch, transformers="5.23.0", optimum_onnx=None)["extra optimum"]
    assert "optimum-onnx, transformers 5.23.0 is not " in found.text
    assert found.remedy == "pip install 'llmkit[optimum]' in an environment of its own"
