"""`llmkit report -o`: what runs of the program left, in the forms that people and programs read."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

import pytest

from llmkit.cli.app import main

MINI = files("llmkit_evalsets") / "mini"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The record of a short run on the mini benchmark, with its samples."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    assert main(["eval", str(MINI / "base"), "--bench=mini", "--limit=1", "--log-samples", "-o", str(path), "-q"]) == 0
    return path


def test_a_run_of_eval_becomes_the_files_that_lm_eval_writes(tmp_path, call, run):
    """The same keys in samples as lm-eval's own, for a real run with logged samples."""
    done = call("report", run, "--format", "lm-eval", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    path = next(p for p in done.document["files"] if "samples_" in p)
    with open(path, encoding="utf-8") as file:
        sample = json.loads(file.readline())
    assert set(sample) == {
        "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics",
        "doc_hash", "prompt_hash", "target_hash",
    } | set(sample["metrics"])  # fmt: skip
    first = sample["arguments"]["gen_args_0"]
    assert first["arg_0"].rstrip().endswith("Answer:")
    assert [sample["arguments"][f"gen_args_{i}"]["arg_1"] for i in range(4)] == [" A", " B", " C", " D"]
    assert hashlib.sha256(first["arg_0"].encode()).hexdigest() == sample["prompt_hash"]


def test_what_cannot_be_written_is_said_in_a_line(call, tmp_path, run):
    other = tmp_path / "notes.html"
    other.write_text("<!doctype html><p>mine")
    bad = {
        ("report", run, "-o", other): "already exists and is not a page to look at",
        ("report", run, "-o", tmp_path / "none" / "r.html"): "does not exist",
        ("report", run, "-o", tmp_path): "the ending says no format",
        ("report", run, "-o", tmp_path / "r.html", "--format", "htlm"): "did you mean --format html?",
        ("report", run, "--format", "html"): "no -o says where",
        ("report", run, "--format", "lm-eval", "-o", run): "is a file",
        ("report", tmp_path / "none.json", "-o", tmp_path / "r.html"): "No such file",
        ("report", other, "-o", tmp_path / "r.html"): "hint: make the file again, or copy it again",
        ("report", tmp_path, "-o", tmp_path / "r.html"): "without a results_*.json",
    }
    for args, words in bad.items():
        done = call(*args)
        assert (done.code, words in done.err) == (2, True), (args, done.err)
    assert other.read_text() == "<!doctype html><p>mine"
    assert not (tmp_path / "r.html").exists()


def test_a_report_takes_the_place_of_an_earlier_one(call, tmp_path, run):
    page = tmp_path / "report.html"
    for _ in range(2):
        done = call("report", run, "-o", page, "-q")
        assert (done.code, done.out.strip()) == (0, str(page))
    assert "Mini" in page.read_text(encoding="utf-8") or "mini" in page.read_text(encoding="utf-8")


def test_steps_and_layer_errors_come_from_what_quantize_left(call, tmp_path):
    """Manifest, run of perplexity and run of eval of one checkpoint are one row of the table of steps."""
    out, text = tmp_path / "q", tmp_path / "text.txt"
    text.write_text((MINI / "text.txt").read_text(encoding="utf-8")[:2200], encoding="utf-8")
    options = ["--bits", "8", "--method", "rtn", "--evaluate", text]
    done = call("quantize", MINI / "base", *options, "-o", out, "--json")
    assert done.code == 0, done.err
    measured = json.loads((out / "llmkit.json").read_text())["run"]
    assert measured["evaluation"] == done.document["evaluation"]
    assert measured["sizes"] == done.document["sizes"]
    worst = done.document["worst"][0]
    assert measured["errors"][worst["name"]] == worst["relative_error"] == max(measured["errors"].values())
    assert call("verify", out).code == 0
    (tmp_path / "text.json").write_text(call("perplexity", out, "--text", text, "--json").out)
    page = tmp_path / "report.html"
    done = call("report", tmp_path / "text.json", "-o", page)
    assert done.code == 0, done.err
    shown = page.read_text(encoding="utf-8")
    assert shown.count('<th role="columnheader" scope="col" class="n"><bdi dir="auto">q</bdi></th>') == 1
    assert f"{measured['evaluation']['perplexity_after']:.2f}" in shown
    assert f"16.0 → {measured['sizes']['bits_per_weight']:.1f}" in shown
    assert "mlp.down_proj" in shown
