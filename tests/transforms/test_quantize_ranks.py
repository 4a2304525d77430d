"""Two processes under torchrun write what one does: the order of sums aside, whose last bits may turn a tie."""

from __future__ import annotations

import os
import subprocess
import sys

import family_world as world
import pytest
import vocab_world

import llmkit
from llmkit.checkpoint.quantized import dequantized


def command(model, text, out):
    return [
        "quantize", str(model), "--bits", "4", "--method", "gptq", "--group-size", "channel",
        "--calibration", str(text),
        "--samples", "12", "--length", "24", "-o", str(out), "--json",
    ]  # fmt: skip


def ran(words, **environment):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    model, text = world.written(tmp_path / "m", "llama", None), tmp_path / "text.txt"
    text.write_text("\n".join(vocab_world.ENGLISH) * 4)
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29655", "-m", "llmkit"]
    for words, out in ((["-m", "llmkit"], "one"), (run, "two")):
        done = ran([*words, *command(model, text, tmp_path / out)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"relative_error"') == 1 + 5  # one document
    one, two = (dequantized(llmkit.open_checkpoint(tmp_path / out)).tensors for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, lazy in one.items():
        differing = (lazy.load() - two[name].load()).abs() > 1e-4
        assert differing.float().mean() < 0.02, name
    failed = ran([*run, *command(model, text, tmp_path / "three"), "--samples", "1"])
    assert failed.returncode != 0
    assert (failed.stdout + failed.stderr).count("1 windows of text for 2 processes") == 1, failed.stdout
    assert not (tmp_path / "three").exists()
