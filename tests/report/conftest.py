"""Pages of every size that a report meets, and the browser that opens them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser as chromium
import pytest
import report_world as world

from llmkit.evaluation.report_inputs import CheckpointFacts, ReportInputs, TextScore
from llmkit.report.page import render


def inputs() -> dict[str, ReportInputs]:
    """What the pages are made of, by name."""
    mmlu, mini = world.mmlu(seed=1), world.mmlu(seed=2, only=3, n=20)
    runs = [
        world.run("vicuna-7b", mini, samples=True),
        world.run("vicuna-7b-int8", world.changed(mini, 3, 0.3), samples=True, history=("quantize",)),
        world.run("vicuna-7b-int4-with-a-rather-long-name", world.changed(mini, 4, 0.6), samples=True),
    ]
    reference = {
        "model": "vicuna-7b-f16", "perplexity_before": 12.1, "perplexity_ratio": 1.0203, "perplexity_ratio_low": 1.01,
        "perplexity_ratio_high": 1.03, "kl_divergence": 0.0321, "kl_median": 0.011, "kl_99": 0.41, "flipped": 0.087,
    }  # fmt: skip
    text = TextScore(
        {"label": "vicuna-7b", "dtype": "float32", "path": "/models/vicuna-7b"}, 12.3456, 2.513, 0.01, 40000, 33.0,
        {"bits_per_token": 3.626, "context": 2048, "stride": 2048, "text": "wiki.txt", "reference": reference},
    )  # fmt: skip
    return {
        "mmlu": ReportInputs((world.run("vicuna-7b", mmlu),)),
        "ceval": ReportInputs((world.run("中文模型-7b", world.ceval(seed=4)),)),
        "three": ReportInputs(tuple(runs), (text,), (quantized(),)),
        "one question": ReportInputs((world.run("vicuna-7b", world.mmlu(seed=1, n=1, only=1)),)),
        "perplexity": ReportInputs((), (text,)),
        "checkpoint": ReportInputs((), (), (quantized(),)),
        "tasks": ReportInputs(tuple(replace(world.run(n), tasks=world.tasks(s)) for n, s in (("a", 0.0), ("b", 0.02)))),
    }


def quantized() -> CheckpointFacts:
    """A checkpoint of 32 layers with a known error for each matrix."""
    roles = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    errors = {
        f"model.layers.{n}.{r}.weight": 0.02 + 0.001 * n + 0.005 * i for n in range(32) for i, r in enumerate(roles)
    }
    return CheckpointFacts(
        path="/models/vicuna-7b-int8",
        recipe=[{"transform": "quantize"}],
        nbytes=90_000_000,
        sizes={"bits_per_weight": 4.62},
        errors=errors,
        evaluation={"perplexity_before": 12.345, "perplexity_after": 12.9, "kl_divergence": 0.0321, "flipped": 0.087},
    )


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each page in a file."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {}
    for name, each in inputs().items():
        paths[name] = folder / f"{name.replace(' ', '-')}.html"
        paths[name].write_text(render(each), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    """One headless Chromium for all tests of a worker."""
    program = chromium.executable()
    if program is None:
        pytest.skip("no Chromium here (apt-get install chromium, or LLMKIT_CHROMIUM=/path/to/chrome)")
    with chromium.browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened
