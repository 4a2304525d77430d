"""`quantize --evaluate`: what is measured is what the models that were read and written give on windows held out."""

from __future__ import annotations

import random

import pytest

import llmkit
from llmkit.calibration.held_out import held_out
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import read_text
from llmkit.decoder import load_decoder
from llmkit.evaluation.divergence import ModelDistributions, measure_divergence


@pytest.fixture
def text(tmp_path):
    words = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{words.randrange(100)}" for _ in range(1200)))
    return path


def test_the_rest_of_the_calibration_text(call, tiny, tmp_path, text):
    args = ["--calibration", text, "--samples", "20", "--length", "24"]
    out = tmp_path / "q"
    done = call("quantize", tiny, "--bits", "3", *args, "--evaluate", "rest", "-o", out, "--json")
    assert done.code == 0, done.err
    base = llmkit.open_checkpoint(tiny)
    read = Samples(read_text(text), 20, 24)
    rows = held_out(base, read, read)
    decoders = load_decoder(base), load_decoder(llmkit.open_checkpoint(out))
    expected = measure_divergence(
        ModelDistributions(decoders[0]), decoders[1], [i for row in rows for i in row], context=24
    ).as_dict()
    found = done.document["evaluation"]
    assert found.pop("text") == "rest"
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["kl_divergence"] > 0


def test_a_file_is_measured_without_calibration_and_said(call, tiny, tmp_path, text):
    done = call("quantize", tiny, "--bits", "8", "--evaluate", text, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("perplexity "))
    assert " → " in line
    assert "likeliest tokens are others" in line


def test_what_is_left_is_looked_at_before_any_work(call, tiny, tmp_path, text):
    args = ["--calibration", text, "--length", "24", "--samples", "1000"]
    done = call("quantize", tiny, "--bits", "4", *args, "--evaluate", "rest", "-o", tmp_path / "q")
    assert done.code == 2
    assert "none is left to measure on" in done.err
    none = call("quantize", tiny, "--bits", "8", "--method", "rtn", "--evaluate", "rest", "-o", tmp_path / "q")
    assert (none.code, "no text that calibration reads" in none.err) == (2, True)
    assert not (tmp_path / "q").exists()
