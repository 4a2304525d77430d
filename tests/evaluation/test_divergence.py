"""Two models beside each other: the divergence that torch's kl_div gives for transformers' logits."""

from __future__ import annotations

import pytest
import torch

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.evaluation.divergence import ModelDistributions, measure_divergence
from llmkit.evaluation.perplexity import measure_perplexity


@pytest.fixture(scope="module")
def pair(tiny_llama):
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(tiny_llama)
    name = "model.layers.1.mlp.down_proj.weight"
    moved = base.tensors[name].load()
    moved = moved + 0.3 * moved.std() * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    theirs = [AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval() for _ in range(2)]
    theirs[1].load_state_dict({name: moved}, strict=False)
    from llmkit.tensors.constant import constant

    changed = base.derive(tensors={**base.tensors, name: constant(moved)})
    return (load_decoder(base), load_decoder(changed)), theirs


def test_divergence_and_flips_are_those_of_transformers(pair):
    (before, after), theirs = pair
    ids = torch.randint(0, 380, (3, 70), generator=torch.Generator().manual_seed(4))
    found = measure_divergence(ModelDistributions(before), after, ids.flatten().tolist(), context=70)
    with torch.inference_mode():
        p, q = (model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1) for model in theirs)
    assert found.kl == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)), rel=1e-4
    )
    assert found.flipped == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    assert 0 < found.flipped < 1
    assert found.before == measure_perplexity(before, ids.flatten().tolist(), context=70)
    assert found.after == measure_perplexity(after, ids.flatten().tolist(), context=70)


def test_a_model_does_not_diverge_from_itself(pair):
    (before, _), _ = pair
    found = measure_divergence(ModelDistributions(before), before, list(range(40)), context=20)
    assert (found.kl, found.flipped) == (0.0, 0.0)
    assert found.as_dict()["perplexity_before"] == found.as_dict()["perplexity_after"]
