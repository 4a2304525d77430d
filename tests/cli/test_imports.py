"""What must be fast loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "lm_eval", "datasets", "huggingface_hub", "sentencepiece", "tokenizers",
         "gguf")  # fmt: skip
SCRIPT = f"""
import sys, json, io, contextlib
from llmkit.cli.app import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))
"""


def loaded(*args: object) -> list:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, args)], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["eval", "--help"], ["delta", "apply", "--help"], ["plugins", "list"]],
    ids=" ".join,
)  # fmt: skip
def test_help_loads_nothing_heavy(args):
    assert loaded(*args) == [0, []]


def test_a_benchmark_that_nobody_knows_is_said_without_lm_eval(capsys):
    from llmkit.cli.app import main

    assert loaded("eval", "M", "--bench", "helaswag") == [2, []]
    assert main(["eval", "M", "--bench", "mmul"]) == 2
    assert "did you mean --bench mmlu?" in capsys.readouterr().err
    assert main(["eval", "M", "--bench", "arc_easy"]) == 2
    assert "M: no such file or folder" in capsys.readouterr().err  # a task of that name there is


def test_inspect_loads_nothing_heavy(tiny):
    assert loaded("inspect", tiny) == [0, []]
    assert loaded("inspect", tiny, "--tensors", "--json") == [0, []]


def test_dry_runs_load_nothing_heavy(tiny, model, tmp_path):
    assert loaded("quantize", tiny, "--bits", "4", "--group-size", "32", "-o", tmp_path / "out", "--dry-run") == [0, []]
    assert loaded("delta", "make", tiny, model, "-o", tmp_path / "out", "--dry-run") == [0, []]
    assert not (tmp_path / "out").exists()


def test_conversions_load_nothing_heavy(tiny, tmp_path):
    """The plan never; the run neither, where bytes only move."""
    for layout in ("meta", "litgpt", "llama2c"):
        out = tmp_path / layout
        assert loaded("convert", tiny, "--to", layout, "-o", out, "--dry-run") == [0, []]
        assert not out.exists()
        assert loaded("convert", tiny, "--to", layout, "-o", out, "-q") == [0, []]
        assert loaded("inspect", out) == [0, []]
        assert loaded("convert", out, "--to", "hf", "-o", tmp_path / f"{layout}-hf", "-q") == [0, []]


def test_a_graph_is_planned_and_written_without_torch(tiny, tmp_path):
    """Neither where weights are linked nor where they are copied. (The graph is made with numpy.)"""
    pytest.importorskip("onnx")
    for bits in ([], ["--bits", "4"]):
        assert loaded("export", tiny, "--to", "onnx", *bits, "-o", tmp_path / "out", "--dry-run") == [0, ["numpy"]]
    assert not (tmp_path / "out").exists()
    for weights in ("link", "copy"):
        out = tmp_path / weights
        args = ["--to", "onnx", "--weights", weights, "--no-check", "-q"]
        assert loaded("export", tiny, *args, "-o", out) == [0, ["numpy"]]


def test_inspect_of_a_pickle_does_not_load_torch(tmp_path):
    import torch

    torch.save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert loaded("inspect", tmp_path) == [0, []]


def test_gguf_is_inspected_and_converted_back_without_heavy_imports(model, tmp_path):
    import llmkit
    from llmkit.transforms.convert import convert

    for type_, out in (("f16", "a"), ("q8_0", "b")):
        llmkit.save(convert(llmkit.open_checkpoint(model), to="gguf", type=type_), tmp_path / out)
        assert loaded("inspect", tmp_path / out, "--tensors", "--json") == [0, []]
    # Its vectors were float32 and stay so: nothing is computed.
    assert loaded("convert", tmp_path / "a", "--to", "hf", "-o", tmp_path / "hf") == [0, []]
    assert loaded("convert", tmp_path / "hf", "--to", "gguf", "-o", tmp_path / "again", "--dry-run") == [0, []]


def test_completion_answers_without_heavy_imports():
    script = SCRIPT.replace("main(sys.argv[1:])", "0; complete()").replace(
        "from llmkit.cli.app import main",
        "from llmkit.cli.app import main\ndef complete():\n"
        " try: main([])\n"
        " except SystemExit: pass",
    )  # fmt: skip
    env = {"_LLMKIT_COMPLETE": "complete_bash", "COMP_WORDS": "llmkit insp", "COMP_CWORD": "1", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
