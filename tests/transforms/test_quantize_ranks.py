"""Two processes under torchrun write what one does: the order of sums aside, whose last bits may turn a tie."""

from __future__ import annotations

import subprocess
import sys

import family_world as world
import pytest
import vocab_world

import llmkit
from llmkit.checkpoint.quantized import dequantized
from llmkit.cli.app import main


def command(model, text, out):
    return [
        "quantize", str(model), "--bits", "4", "--method", "gptq", "--group-size", "channel",
        "--calibration", str(text),
        "--samples", "12", "--length", "24", "-o", str(out), "--json",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_two_processes_write_what_one_does(tmp_path, family):
    """And two that have too little to do say so once; both runs are of the same processes, which import torch once."""
    model, text = world.written(tmp_path / "m", family, None), tmp_path / "text.txt"
    text.write_text("\n".join(vocab_world.ENGLISH) * 4)
    assert main(command(model, text, tmp_path / "one")) == 0
    runs = command(model, text, tmp_path / "two"), [*command(model, text, tmp_path / "three"), "--samples", "1"]
    script = tmp_path / "both.py"
    script.write_text(f"from llmkit.cli.app import main\nfor words in {runs!r}:\n    code = main(words)\nexit(code)\n")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29655", str(script)]
    done = subprocess.run([sys.executable, *torchrun], capture_output=True, text=True, timeout=300)
    assert (tmp_path / "two").is_dir(), done.stderr
    assert done.stdout.count('"relative_error"') == 1 + 5  # one document
    one, two = (dequantized(llmkit.open_checkpoint(tmp_path / out)).tensors for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, lazy in one.items():
        differing = (lazy.load() - two[name].load()).abs() > 1e-4
        assert differing.float().mean() < 0.02, name
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("1 windows of text for 2 processes") == 1, done.stdout
    assert not (tmp_path / "three").exists()
