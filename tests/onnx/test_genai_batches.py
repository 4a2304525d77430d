"""Batches in ONNX Runtime GenAI, which pads on the right, held to the torch decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runtimes import FAMILIES, N_TOKENS, ONE_THREAD, PAD, PROMPTS, exported, source_of

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder

pytestmark = pytest.mark.genai
genai = pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI (extra genai)")
END = 2  # GenAI ends a text with it, as genai_config.json says


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp("batches"))


def loaded(folder):
    config = genai.Config(str(folder))
    config.overlay(ONE_THREAD)
    return genai.Model(config)


def test_batch_of_unequal_prompts(folder):
    """GenAI pads on the right. Each row's logits, token by token, are those of its text alone."""
    model, longest = loaded(folder), max(map(len, PROMPTS))
    options = genai.GeneratorParams(model)
    # No row ends before the others: what GenAI gives for a finished row is nobody's text.
    options.set_search_options(max_length=longest + N_TOKENS, min_length=longest + N_TOKENS, batch_size=len(PROMPTS))
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([p + [PAD] * (longest - len(p)) for p in PROMPTS], dtype=np.int32))
    found, chosen = [], []
    for _ in range(N_TOKENS):
        found.append(torch.from_numpy(generator.get_logits().reshape(len(PROMPTS), -1).copy()))
        generator.generate_next_token()
        chosen.append([int(token) for token in generator.get_next_tokens()])
    decoder = load_decoder(open_checkpoint(source_of(folder)))
    for i, prompt in enumerate(PROMPTS):
        text = [*prompt, *(row[i] for row in chosen)]
        wanted = decoder(torch.tensor([text]))[0, len(prompt) - 1 : -1].clone()
        logits = torch.stack([row[i] for row in found])
        logits[:, END] = wanted[:, END] = -1e9  # GenAI hides it before `min_length`
        assert wanted.argmax(-1).tolist() == text[len(prompt) :]
        logits[:, END] = wanted[:, END] = 0
        assert float((logits - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)) <= 1e-5
