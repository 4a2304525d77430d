"""What the extras bring is asked for by the command that needs it, and by no other."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import pytest

BASE = str(files("llmkit_evalsets") / "mini" / "base")
EXTRAS = {"eval": ("lm_eval", "datasets"), "onnx": ("onnx",), "cpu": ("onnxruntime",)}
# Importing what is None fails as if it were not installed; a process of its own, for modules that are loaded stay so.
WITHOUT = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
from llmkit.cli.app import main
sys.stdout.write(json.dumps([main(args) for args in json.loads(sys.argv[2])]))
"""


def run_without(names: list[str], *calls: list[str]) -> tuple[list[int], str]:
    """Exit codes of calls in one process without some packages, and its stderr."""
    command = [sys.executable, "-c", WITHOUT, json.dumps(names), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("extra", "args"),
    [
        ("eval", ["eval", BASE, "--bench", "mmlu", "--shots", "0", "--data", "{tmp}"]),
        ("onnx", ["export", BASE, "--to", "onnx", "--no-check", "-o", "{tmp}/out"]),
    ],
)
def test_a_missing_extra_is_one_line_with_its_command(tmp_path, extra, args):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_text("What?,a,b,c,d,A\n")
    codes, said = run_without(list(EXTRAS[extra]), [a.format(tmp=tmp_path) for a in args])
    assert codes == [2]
    assert f"is not installed, which the extra '{extra}' brings" in said
    assert f"pip install 'llmkit[{extra}]'" in said
    assert not (tmp_path / "out").exists()


def test_what_needs_no_extra_runs_without_them(tmp_path):
    (tmp_path / "text.txt").write_text("A star is a ball of gas. " * 20)
    codes, said = run_without(
        [name for names in EXTRAS.values() for name in names],
        ["quantize", BASE, "--bits", "8", "-o", str(tmp_path / "out"), "-q"],
        ["inspect", str(tmp_path / "out"), "-q"],
        ["generate", BASE, "A star", "--max-tokens", "2", "-q"],
        ["perplexity", BASE, "--text", str(tmp_path / "text.txt"), "-q"],
    )
    assert codes == [0, 0, 0, 0], said
