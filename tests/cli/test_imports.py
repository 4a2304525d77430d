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
    codes = [main(args) for args in json.loads(sys.argv[1])]
print(json.dumps([codes, [m for m in {HEAVY!r} if m in sys.modules]]))
"""


def loaded(*calls: list) -> list:
    """Exit codes of calls in one process, and what of the heavy is loaded after them all."""
    words = json.dumps([[str(word) for word in call] for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, words], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_help_loads_nothing_heavy():
    calls = ["--help"], ["--version"], ["eval", "--help"], ["delta", "apply", "--help"], ["plugins", "list"]
    assert loaded(*calls) == [[0] * 5, []]


def test_a_benchmark_that_nobody_knows_is_said_without_lm_eval(capsys):
    from llmkit.cli.app import main

    assert loaded(["eval", "M", "--bench", "helaswag"]) == [[2], []]
    assert main(["eval", "M", "--bench", "mmul"]) == 2
    assert "did you mean --bench mmlu?" in capsys.readouterr().err
    assert main(["eval", "M", "--bench", "arc_easy"]) == 2
    assert "M: no such file or folder" in capsys.readouterr().err  # a task of that name there is


def test_a_report_is_written_without_heavy_imports(tmp_path):
    text = {"perplexity": 9.5, "nll": 2.25, "stderr": 0.1, "n_scored": 100, "model": {"label": "m"}}
    (tmp_path / "text.json").write_text(json.dumps(text))
    assert loaded(["report", tmp_path / "text.json", "-o", tmp_path / "report.html"]) == [[0], []]


def test_inspect_loads_nothing_heavy(tiny):
    assert loaded(["inspect", tiny], ["inspect", tiny, "--tensors", "--json"]) == [[0, 0], []]


def test_dry_runs_load_nothing_heavy(tiny, model, tmp_path):
    out = ["-o", tmp_path / "out", "--dry-run"]
    calls = ["quantize", tiny, "--bits", "4", "--group-size", "32", *out], ["delta", "make", tiny, model, *out]
    assert loaded(*calls) == [[0, 0], []]
    assert not (tmp_path / "out").exists()


def test_a_published_delta_is_planned_without_torch(tiny, model, tmp_path):
    """Its base is checked by some values, which numpy computes with."""
    import llmkit
    from llmkit.transforms import delta

    pair = [llmkit.open_checkpoint(folder) for folder in (tiny, model)]
    llmkit.save(delta.make(*pair, profile="plain"), tmp_path / "delta")
    plan = ["delta", "apply", tiny, tmp_path / "delta", "-o", tmp_path / "out", "--dry-run"]
    assert loaded(plan) == [[0], ["numpy"]]


def test_conversions_load_nothing_heavy(tiny, tmp_path):
    """The plan never; the run neither, where bytes only move (which it would not where the plan had left something)."""
    for layout in ("meta", "litgpt", "llama2c"):
        out = tmp_path / layout
        to, back = ["convert", tiny, "--to", layout, "-o", out], ["convert", out, "--to", "hf", "-o", f"{out}-hf"]
        assert loaded([*to, "--dry-run"], [*to, "-q"], ["inspect", out], [*back, "-q"]) == [[0] * 4, []]


def test_a_graph_is_planned_and_written_without_torch(tiny, tmp_path):
    """Neither where weights are linked nor where they are copied. (The graph is made with numpy.)"""
    pytest.importorskip("onnx")
    export = ["export", tiny, "--to", "onnx", "-o"]
    plan = [*export, tmp_path / "out", "--dry-run"]
    runs = [[*export, tmp_path / weights, "--weights", weights, "--no-check", "-q"] for weights in ("link", "copy")]
    assert loaded(plan, [*plan, "--bits", "4"], *runs) == [[0] * 4, ["numpy"]]
    assert not (tmp_path / "out").exists()


def test_inspect_of_a_pickle_does_not_load_torch(tmp_path):
    import torch

    torch.save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert loaded(["inspect", tmp_path]) == [[0], []]


def test_gguf_is_inspected_and_converted_back_without_heavy_imports(model, tmp_path):
    import llmkit
    from llmkit.transforms.convert import convert

    for type_, out in (("f16", "a"), ("q8_0", "b")):
        llmkit.save(convert(llmkit.open_checkpoint(model), to="gguf", type=type_), tmp_path / out)
    inspect = [["inspect", tmp_path / out, "--tensors", "--json"] for out in ("a", "b")]
    # Its vectors were float32 and stay so: nothing is computed.
    back = ["convert", tmp_path / "a", "--to", "hf", "-o", tmp_path / "hf"]
    again = ["convert", tmp_path / "hf", "--to", "gguf", "-o", tmp_path / "again", "--dry-run"]
    assert loaded(*inspect, back, again) == [[0] * 4, []]


def test_completion_answers_without_heavy_imports():
    script = SCRIPT.replace("[main(args) for args in json.loads(sys.argv[1])]", "0; complete()").replace(
        "from llmkit.cli.app import main",
        "from llmkit.cli.app import main\ndef complete():\n"
        " try: main([])\n"
        " except SystemExit: pass",
    )  # fmt: skip
    env = {"_LLMKIT_COMPLETE": "complete_bash", "COMP_WORDS": "llmkit insp", "COMP_CWORD": "1", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_records_are_read_and_compared_without_heavy_imports(tmp_path):
    subject = {"n": 2, "acc": 0.5, "stderr": 0.5, "choices": "AB", "targets": "AA"}
    bench = {"title": "mini", "subjects": {"star_lore": subject}, "missing": [], "shots": 2}
    document = {"format": "llmkit.eval/1", "created": "", "model": {}, "settings": {}, "versions": {}, "elapsed_s": 1}
    run = tmp_path / "run.json"
    run.write_text(json.dumps(document | {"benches": {"mini": bench}}), encoding="utf-8")
    assert loaded(["report", run], ["report", run, "--json", "--fail-under", "0.1"]) == [[0, 0], []]
    assert loaded(["report", run, run, "--max-drop", "0.01"]) == [[0], ["numpy"]]
