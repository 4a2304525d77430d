"""Prefixes longer and shorter than an attention window are shared with the scores of lm-eval's `hf` backend."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from tiny_tokenizer import train_tokenizer

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.runner import make_lm

STEM = "The following are multiple choice questions (with answers) about small things.\n\n"
QUESTIONS = [
    "Which of these is a fruit?\nA. stone\nB. apple\nAnswer:",
    "How many legs has a spider?\nA. 6\nB. 8\nAnswer:",
]
# Windows of 7 tokens; of phi3's, only sequences of at most 32 tokens may be shared (longer ones have other keys).
CASES = [("mistral", None), ("qwen2", "window-above"), ("gemma2", None), ("gemma3", None), ("phi3", "128k-short")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def both(request, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name, variant = request.param
    plugin = next(p for p in default_registry().plugins if p.name == name)
    tiny = default_registry().load(plugin).tiny_config(variant)
    config = {**tiny, "vocab_size": 380, "max_position_embeddings": 256, "initializer_range": 0.3}
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(5)
    made = transformers.AutoConfig.for_model(**config)
    transformers.AutoModelForCausalLM.from_config(made).eval().save_pretrained(folder)
    train_tokenizer(folder)
    # eager: transformers 4 leaves Gemma 2's caps out of its fused attention
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, attn_implementation="eager")
    return make_lm(open_checkpoint(folder), EngineOptions(batch_tokens=200)), theirs


def test_scores_with_shared_prefixes(both):
    ours, theirs = both
    assert ours.scorer.backend == "llmkit"
    ours.scorer.forward_cost = 1  # even short stretches are shared
    asked = [(STEM + q, f" {word}") for q in QUESTIONS for word in ("A", "apple river", "stone stone stone")]
    asked += [("The", f" {word}") for word in ("following", "following are", "apple stone")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=a, idx=i, metadata=("t", i, 1))
        for i, a in enumerate(asked)
    ]
    got = ours.loglikelihood(requests)
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [s for s, _ in got] == pytest.approx([s for s, _ in wanted], abs=1e-4)
    assert [g for _, g in got] == [g for _, g in wanted]
    assert ours.scorer.usage.tokens < ours.scorer.usage.tokens_unshared
