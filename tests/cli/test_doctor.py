"""What `llmkit doctor` says of ONNX Runtime and of extras, for installations that this one is not."""

from __future__ import annotations

import re
from importlib.metadata import metadata

import pytest

from llmkit.cli import health
from llmkit.cli.packages import source


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
    assert found.remedy == f"pip install '{source()}[cpu,optimum]' in an environment of its own"


def test_every_remedy_offers_what_there_is(monkeypatch):
    """Every package is absent: whatever is offered then is an extra of the metadata."""
    monkeypatch.setattr(health, "installed_version", lambda name: None)
    extras = set(metadata("llmkit").get_all("Provides-Extra"))
    remedies = [f.remedy for look in (health._packages, health._onnx_runtime) for f in look() if f.remedy]
    offered = [extra for r in remedies for names in re.findall(r"\[([a-z,]+)\]", r) for extra in names.split(",")]
    assert {"cpu", "gpu", "eval", "onnx", "optimum"} <= set(offered)
    assert set(offered) <= extras
    assert all(r.startswith("pip install '") for r in remedies)
