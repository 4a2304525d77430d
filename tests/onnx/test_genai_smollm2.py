"""SmolLM2-135M in ONNX Runtime GenAI: in float32 the text of transformers, in integers that of llmkit's runner.

Integers with its first layers alone: what they depend on is in each.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
from runtimes import ONE_THREAD, end_and_pad, written_by_llmkit

from llmkit.cli.app import main

pytestmark = [pytest.mark.genai, pytest.mark.slow]
genai = pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI (extra genai)")
NEVER_WRITTEN = 3  # <repo_name>; the true end token comes in some texts of rounded weights, and they go on past it


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a model with options."""

    def run(model, *options):
        out = tmp_path_factory.mktemp("genai") / "out"
        assert main(["export", str(model), "--to", "onnx", *options, "--no-check", "-q", "-o", str(out)]) == 0
        return out

    return run


@pytest.fixture(scope="module", params=["gqa", "flash"])
def folder(request, smollm2, exported):
    return exported(smollm2, "--attention", request.param)


@lru_cache(maxsize=1)
def opened(folder, **search):
    """The model of a folder, the last one kept."""
    config = genai.Config(str(folder))
    config.overlay(ONE_THREAD)
    config.overlay(json.dumps({"model": {"eos_token_id": NEVER_WRITTEN}, "search": search}))
    return genai.Model(config)


def written(folder, rows, n_tokens=16, **search):
    """What GenAI writes after each row of one batch, past any end token: padded right, with its padding token."""
    model, (_, pad) = opened(folder, **search), end_and_pad(folder)
    longest = max(map(len, rows))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=longest + n_tokens, batch_size=len(rows))
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([row + [pad] * (longest - len(row)) for row in rows], dtype=np.int32))
    found = []
    for _ in range(n_tokens):
        generator.generate_next_token()
        found.append([int(token) for token in generator.get_next_tokens()])
    return [list(text) for text in zip(*found, strict=True)]


@pytest.mark.parametrize("folder", ["gqa"], indirect=True)
def test_prompts_alone(folder, prompts, texts):
    """The plain one and the long one; code and a chat are in the batches."""
    assert [written(folder, [prompts[i]])[0] for i in (0, -1)] == [texts[i] for i in (0, -1)]


@pytest.mark.parametrize("folder", ["flash"], indirect=True)
def test_a_long_prompt_in_chunks(folder, prompts, texts):
    assert written(folder, prompts[-1:], chunk_size=256) == texts[-1:]


def test_a_batch_of_unequal_prompts(folder, prompts, texts):
    assert written(folder, prompts[:3]) == texts[:3]


@pytest.mark.parametrize("options", [("--bits", "8")])
def test_integers(options, shallow_smollm2, exported, prompts):
    short, out = prompts[:3], exported(shallow_smollm2, *options)
    assert [written(out, [prompt], 8)[0] for prompt in short] == written_by_llmkit(out, short, 8)


@pytest.mark.parametrize("bits", ["4"])
def test_integers_in_a_batch(bits, shallow_smollm2, exported, prompts):
    """With activations in floats (slow: few tokens): in int8 their rounding tips with the shape of the batch."""
    short, out = prompts[:3], exported(shallow_smollm2, "--bits", bits, "--accuracy-level", "0", "--attention", "flash")
    assert written(out, short, 8) == written_by_llmkit(out, short, 8)
