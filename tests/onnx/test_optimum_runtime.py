"""Exported folders in Optimum's ORTModelForCausalLM, held to the torch decoder: alone, and in a left-padded batch."""

from __future__ import annotations

import pytest
import torch

from tests.onnx.runtimes import FAMILIES, N_TOKENS, PROMPTS, expected, exported

pytestmark = pytest.mark.optimum
optimum = pytest.importorskip("optimum.onnxruntime", reason="needs Optimum (extra optimum, which pins transformers)")
OPTIONS = {"max_new_tokens": N_TOKENS, "min_new_tokens": N_TOKENS, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp("optimum"))


def written(model, rows, mask=None):
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **OPTIONS)
    return found[:, ids.shape[1] :].tolist()


def test_greedy_text(folder):
    model = optimum.ORTModelForCausalLM.from_pretrained(folder)
    wanted = expected(folder)
    assert [written(model, [p])[0] for p in PROMPTS] == wanted
    longest = max(len(p) for p in PROMPTS)
    rows = [[0] * (longest - len(p)) + p for p in PROMPTS]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]
    assert written(model, rows, mask) == wanted
