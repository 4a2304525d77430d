"""A real model, SmolLM2-135M in float32: the exported folder in llmkit's runner writes what transformers writes.

In ONNX Runtime GenAI and in Optimum: `test_genai_smollm2.py`, `test_optimum_smollm2.py`.
"""

from __future__ import annotations

import pytest
import torch
from goldens import error

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.generate import generate
from llmkit.onnx.export import export
from llmkit.onnx.opening import load_onnx

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
pytestmark = pytest.mark.slow
N_TOKENS = 16


@pytest.fixture(scope="module", params=["gqa", "attention"])
def decoder(request, smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    save(export(open_checkpoint(smollm2), weights="link", attention=request.param), folder)
    return load_onnx(folder)


@pytest.mark.parametrize("decoder", ["gqa"], indirect=True)
def test_prompts_alone(decoder, prompts, texts):
    """The plain one and the long one; code and a chat are in the batches."""
    found = [generate(decoder, [prompts[i]], max_new_tokens=N_TOKENS)[0] for i in (0, -1)]
    assert found == [texts[i] for i in (0, -1)]


def test_in_one_batch(decoder, prompts, texts):
    assert generate(decoder, prompts[:3], max_new_tokens=N_TOKENS) == texts[:3]


@pytest.mark.parametrize("decoder", ["attention"], indirect=True)
def test_with_the_prompt_in_stretches(decoder, prompts, texts, monkeypatch):
    monkeypatch.setattr(decoder, "scores_nbytes", 1)
    lengths, run = [], decoder.parts.last.run
    monkeypatch.setattr(
        decoder.parts.last, "run", lambda f, *to: lengths.append(f["input_ids"].shape[1]) or run(f, *to)
    )
    assert generate(decoder, prompts[-1:], max_new_tokens=N_TOKENS) == texts[-1:]
    assert lengths[:12] == [64] * 10 + [60, 1]


@pytest.fixture(scope="module")
def logits(smollm2, prompts):
    decoder = load_decoder(open_checkpoint(smollm2))
    return [decoder(torch.tensor([prompt])) for prompt in prompts]


def test_logits(decoder, logits, prompts):
    """Logits go up to 41 here. Each of torch, transformers and ONNX Runtime is 4e-5 to 2e-4 away from float64."""
    for prompt, wanted in zip(prompts, logits, strict=True):
        assert error(decoder(torch.tensor([prompt])), wanted) <= 1e-5
