"""SmolLM2-135M in Optimum's ORTModelForCausalLM: in float32 the text of transformers, in integers llmkit's runner's.

Integers with its first layers alone: what they depend on is in each.
"""

from __future__ import annotations

import pytest
import torch
from runtimes import left_padded, one_thread, written_by_llmkit

from llmkit.cli.app import main

pytestmark = [pytest.mark.optimum, pytest.mark.slow]
optimum = pytest.importorskip("optimum.onnxruntime", reason="needs Optimum (extra optimum, which pins transformers)")
PAD = 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a model with options, and open it."""

    def run(model, *options):
        out = tmp_path_factory.mktemp("optimum") / "out"
        assert main(["export", str(model), "--to", "onnx", *options, "--no-check", "-q", "-o", str(out)]) == 0
        return out, optimum.ORTModelForCausalLM.from_pretrained(out, session_options=one_thread())

    return run


@pytest.fixture(scope="module", params=["gqa", "attention"])
def model(request, smollm2, exported):
    return exported(smollm2, "--attention", request.param)[1]


def written(model, rows, mask=None, n_tokens=16):
    """What Optimum writes after each row, past any end token."""
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    with torch.inference_mode():
        options = {"max_new_tokens": n_tokens, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model", ["gqa"], indirect=True)
def test_prompts_alone(model, prompts, texts):
    """The plain one and the long one; code and a chat are in the batches."""
    assert [written(model, [prompts[i]])[0] for i in (0, -1)] == [texts[i] for i in (0, -1)]


def test_a_batch_of_unequal_prompts(model, prompts, texts):
    assert written(model, *left_padded(prompts[:3], PAD)) == texts[:3]


@pytest.mark.parametrize("options", [("--bits", "4"), ("--kv-cache-dtype", "int8")])
def test_integers(options, shallow_smollm2, exported, prompts):
    short, (out, model) = prompts[:3], exported(shallow_smollm2, *options)
    assert [written(model, [prompt], n_tokens=8)[0] for prompt in short] == written_by_llmkit(out, short, 8)


@pytest.mark.parametrize("bits", ["8"])
def test_integers_in_a_batch(bits, shallow_smollm2, exported, prompts):
    """With activations in floats (slow: few tokens): in int8 their rounding tips with the shape of the batch."""
    short, (out, model) = prompts[:3], exported(shallow_smollm2, "--bits", bits, "--accuracy-level", "0")
    assert written(model, *left_padded(short, PAD), n_tokens=8) == written_by_llmkit(out, short, 8)
