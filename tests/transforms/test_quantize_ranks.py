"""Two processes under torchrun write what one does: the order of sums aside, whose last bits may turn a tie."""

from __future__ import annotations

import subprocess
import sys

import family_world as world
import pytest
import torch
import vocab_world

import llmkit
from llmkit.calibration.ranks import rank
from llmkit.checkpoint.quantized import dequantized
from llmkit.cli.app import main
from llmkit.errors import InputError

RUNS = [("llama", "gptq"), ("llama", "gptq-fast"), ("qwen3_moe", "best")]


def command(model, text, out, method="gptq"):
    return [
        "quantize", str(model), "--bits", "4", "--method", method, "--group-size", "channel",
        "--calibration", str(text),
        "--samples", "12", "--length", "24", "-o", str(out), "--json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each of `RUNS` by one process, then by two that import torch once; last they have too little to do."""
    folder = tmp_path_factory.mktemp("ranks")
    text, lines = folder / "text.txt", []
    text.write_text("\n".join(vocab_world.ENGLISH) * 4)
    for family, method in RUNS:
        of = folder / f"{family} {method}"
        of.mkdir()
        model = world.written(of / "m", family, None)
        assert main(command(model, text, of / "one", method)) == 0
        lines.append(command(model, text, of / "two", method))
    lines.append([*command(model, text, folder / "three"), "--samples", "1"])
    script = folder / "all.py"
    script.write_text(f"from llmkit.cli.app import main\nfor words in {lines!r}:\n    code = main(words)\nexit(code)\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return folder, subprocess.run([sys.executable, *torchrun], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), RUNS)
def test_two_processes_write_what_one_does(runs, family, method):
    folder, done = runs
    of = folder / f"{family} {method}"
    assert (of / "two").is_dir(), done.stderr
    assert done.stdout.count('"relative_error"') == len(RUNS) * (1 + 5)  # one document each
    one, two = (dequantized(llmkit.open_checkpoint(of / out)).tensors for out in ("one", "two"))
    assert one.keys() == two.keys()
    floats, shares = llmkit.open_checkpoint(of / "m").tensors, []
    for name, lazy in one.items():
        a, b, wanted = lazy.load(), two[name].load(), floats[name].load()
        if not torch.equal(a, wanted):
            # Sums in another order: where a tie breaks otherwise, later layers are rounded for other inputs.
            shares.append(((a - b).abs() > 1e-4).float().mean())
            assert float((a - wanted).norm()) == pytest.approx(float((b - wanted).norm()), rel=0.02), name
    assert torch.stack(shares).quantile(0.8) < 0.02


@pytest.mark.slow
def test_two_processes_that_have_too_little_to_do_say_so_once(runs):
    folder, done = runs
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("1 windows of text for 2 processes") == 1, done.stdout
    assert not (folder / "three").exists()


def test_a_rank_that_is_no_number_is_named(monkeypatch):
    for variable in ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "2")
    assert rank() == 2
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "x")
        with pytest.raises(InputError, match=f"the environment has {variable}='x', which is no number"):
            rank()
