"""What the extras bring is asked for by the command that needs it, and by no other."""

from __future__ import annotations

import sys
from importlib.resources import files

import pytest

BASE = str(files("llmkit_evalsets") / "mini" / "base")
EXTRAS = {
    "eval": ("lm_eval", "datasets"),
    "onnx": ("onnx",),
    "cpu": ("onnxruntime",),
}


@pytest.fixture
def without(monkeypatch):
    def block(extra: str) -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] in EXTRAS[extra]]:
            monkeypatch.delitem(sys.modules, name)
        for ours in [n for n in sys.modules if n.startswith(("llmkit.evaluation", "llmkit.onnx"))]:
            monkeypatch.delitem(sys.modules, ours)
        for name in EXTRAS[extra]:
            monkeypatch.setitem(sys.modules, name, None)  # importing it now fails as if it were not installed

    return block


@pytest.mark.parametrize(
    ("extra", "args"),
    [
        ("eval", ["eval", BASE, "--bench", "mmlu", "--shots", "0", "--data", "{tmp}"]),
        ("onnx", ["export", BASE, "--to", "onnx", "--no-check", "-o", "{tmp}/out"]),
    ],
)
def test_a_missing_extra_is_one_line_with_its_command(call, without, tmp_path, extra, args):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_text("What?,a,b,c,d,A\n")
    without(extra)
    done = call(*[a.format(tmp=tmp_path) for a in args])
    assert done.code == 2
    assert f"is not installed, which the extra '{extra}' brings" in done.err
    assert f"pip install 'llmkit[{extra}]'" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_needs_no_extra_runs_without(call, without, tmp_path, extra):
    (tmp_path / "text.txt").write_text("A star is a ball of gas. " * 20)
    without(extra)
    assert call("quantize", BASE, "--bits", "8", "-o", str(tmp_path / "out")).code == 0
    assert call("inspect", str(tmp_path / "out")).code == 0
    assert call("generate", BASE, "A star", "--max-tokens", "2").code == 0
    assert call("perplexity", BASE, "--text", str(tmp_path / "text.txt")).code == 0
