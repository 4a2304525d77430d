"""lm-eval's kinds of tasks by its own definitions, against its `hf` backend: choices, texts, log-probabilities."""

from __future__ import annotations

import logging

import pytest
from small_tasks import KINDS, load
from tiny_model import save_tiny_llama
from tiny_tokenizer import train_tokenizer

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.evaluation.execution import run_tasks
from llmkit.evaluation.runner import make_lm
from llmkit.evaluation.tasks import quiet_lm_eval

SHOTS = 2


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our results and samples, and those of lm-eval's `hf` backend."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tasks")
    save_tiny_llama(folder, max_length=700)
    train_tokenizer(folder)
    lm = make_lm(open_checkpoint(folder))
    results, samples, _ = run_tasks(
        lm, load(data, list(KINDS), 4, new_tokens=9), shots=SHOTS, limit=None, chat_template=False
    )
    loaded = load(data, list(KINDS), 4, new_tokens=9)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=SHOTS)
        task.set_fewshot_seed(seed=1234)
    with quiet_lm_eval():
        theirs = lm_evaluate(HFLM(pretrained=str(folder), device="cpu", dtype="float32"), loaded, bootstrap_iters=0)
    assert not lm.n_truncated
    return results, samples, theirs


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_scored_as_by_lm_evals_hf_backend(both, name):
    results, samples, theirs = both
    name = f"small_{name}"
    wanted = {k: v for k, v in theirs["results"][name].items() if isinstance(v, float) and "stderr" not in k}
    assert wanted
    assert {k: results[name][k] for k in wanted} == pytest.approx(wanted, rel=1e-4)
    their, ours = theirs["samples"][name], samples[name]
    assert [s["doc_id"] for s in ours] == [s["doc_id"] for s in their]
    assert len(ours) == len(their) >= 4
    for a, b in zip(ours, their, strict=True):
        assert a["prompt_sha256"] == b["prompt_hash"]
        for x, y in zip(a["responses"], b["filtered_resps"], strict=True):
            if isinstance(y, str):
                assert x == y
            elif isinstance(y, float):
                assert x == pytest.approx(y, abs=1e-4 * len(b["arguments"][0][0]))
            else:
                assert x[0] == pytest.approx(y[0], abs=1e-4)
                assert x[1] == y[1]
