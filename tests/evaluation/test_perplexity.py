"""Perplexity against transformers' own loss, window by window."""

from __future__ import annotations

import math

import pytest
import torch

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.errors import InputError
from llmkit.evaluation.perplexity import measure_perplexity, windows


@pytest.fixture(scope="module")
def models(tiny_llama):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return load_decoder(open_checkpoint(tiny_llama)), theirs


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 380, (227,), generator=torch.Generator().manual_seed(4)).tolist()


def transformers_nll(model, ids, context, stride):
    """The loop of transformers' documentation on the perplexity of fixed-length models."""
    total, n, scored_to = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        labels = torch.tensor([ids[start:end]])
        labels[:, : max(scored_to - start, 0)] = -100
        n_window = int((labels[:, 1:] != -100).sum())
        if n_window:
            with torch.no_grad():
                total += float(model(torch.tensor([ids[start:end]]), labels=labels).loss) * n_window
        n += n_window
        scored_to = end
        if end == len(ids):
            break
    return total / n, n


@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 64), (64, 16), (50, 49), (90, 1), (226, None)])
def test_windows_score_as_transformers_does(models, ids, context, stride):
    ours, theirs = models
    found = measure_perplexity(ours, ids, context=context, stride=stride)
    nll, n = transformers_nll(theirs, ids, context, stride or context)
    assert found.nll == pytest.approx(nll, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (found.n_scored, found.n_tokens) == (n, 227)


def test_disjoint_windows_leave_out_their_first_tokens():
    assert windows(10, 4, 4) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert windows(9, 4, 4) == [(0, 4, 1), (4, 8, 5)]  # a last window of one token predicts nothing


def test_overlapping_windows_score_each_token_once():
    scored = [p for _, end, first in windows(31, 8, 3) for p in range(first, end)]
    assert scored == list(range(1, 31))


def test_the_standard_error_is_over_tokens(models, ids):
    ours, theirs = models
    found = measure_perplexity(ours, ids[:60], context=60)
    with torch.no_grad():
        logprobs = torch.log_softmax(theirs(torch.tensor([ids[:60]])).logits[0, :-1], -1)
    values = -logprobs[torch.arange(59), torch.tensor(ids[1:60])].double()
    assert found.stderr == pytest.approx(float(values.std(correction=0)) / math.sqrt(59), rel=1e-4)


@pytest.mark.parametrize(("context", "stride"), [(1, None), (8, 0), (8, 9)])
def test_windows_that_make_no_sense_are_refused(models, ids, context, stride):
    with pytest.raises(InputError, match="do not make windows"):
        measure_perplexity(models[0], ids, context=context, stride=stride)


def test_a_text_of_one_token_is_refused(models):
    with pytest.raises(InputError, match="too few"):
        measure_perplexity(models[0], [3], context=8)
