"""`--memory`: the estimate against the measured peak, and what happens where memory is short all the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from llmkit.architecture.registry import require
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.model import Decoder
from llmkit.decoder.sampling import Sampling
from llmkit.errors import InputError, RequirementError
from llmkit.evaluation.cost import Batch, Costs
from llmkit.evaluation.generation import Request
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.runner import make_lm
from llmkit.evaluation.scoring import Scorer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
PEAK = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmkit.architecture.registry import require
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.sampling import Sampling
from llmkit.evaluation.generation import Request
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.runner import make_lm
from llmkit.evaluation.scoring import Scorer
config, tokens, limit = json.loads(sys.argv[1])
decoder = load_decoder(random_checkpoint(require(config, "x"), config))
decoder(torch.tensor([[1, 2, 3]]))
def peak():
    # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
before = peak()
scorer = Scorer(decoder, tokens, memory=limit)
stem = tuple(range(600))
queries = [Query((*stem, *((7 * i * j + j) % 9999 for j in range(200))), (5, 6, 7)) for i in range(24)]
queries.append(Query(tuple(range(1500)), tuple(range(1, 1501))))
scorer.score(queries)
print(json.dumps([before, peak(), scorer._now.tokens]))
"""


def costs():
    return Costs.of(require(CONFIG, "x").bind(CONFIG), 4)


def of_experts(**changes):
    shape = {"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    config = CONFIG | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | shape | changes
    return Costs.of(require(config, "x").bind(config), 4)


def test_a_token_takes_the_products_of_the_experts_that_it_goes_to():
    all_of_them, two = of_experts(num_experts_per_tok=8), of_experts()
    expert = 3 * 128 * 1024
    assert all_of_them.token_flop - two.token_flop == 2 * 6 * 6 * expert
    assert all_of_them.weights_nbytes == two.weights_nbytes > 4 * 6 * 8 * expert


def measured(tokens, limit=None):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps([CONFIG, tokens, limit])], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_estimate_bounds_the_measured_peak_and_is_no_wild_guess():
    before, peak, _ = measured(2048)
    estimate = costs().peak_nbytes(Batch(2048, 8192, 64 << 20), 1500) - costs().peak_nbytes(Batch(0, 0, 0), 0)
    assert peak - before <= estimate <= 4 * (peak - before)
    # and with a limit, which batches are made for
    least = costs().peak_nbytes(Batch(256, 1024, 8 << 20), 1500)
    before, peak, tokens = measured(2048, least)
    assert tokens == 256
    assert peak <= least


def test_a_limit_makes_batches_smaller_until_they_fit():
    most = Batch(2048, 8192, 64 << 20)
    c = costs()
    assert c.fit(10**12, 100, most) == most
    some = c.fit(c.peak_nbytes(most, 100) - 1, 100, most)
    assert some.tokens == 1024
    assert c.peak_nbytes(some, 100) < c.peak_nbytes(most, 100)
    with pytest.raises(InputError, match="is too little: the weights take") as caught:
        c.fit(1 << 30, 10**6, most)
    needed = int(caught.value.hint.removeprefix("--memory ").removesuffix("MiB")) << 20
    assert c.fit(needed, 10**6, most).tokens == 16


def test_a_limit_is_for_llmkits_own_decoder(tiny_llama):
    from llmkit.decoder import load_backend

    with pytest.raises(InputError, match="--memory is not for --backend transformers"):
        Scorer(load_backend(open_checkpoint(tiny_llama), backend="transformers"), memory=1 << 40)


class Full(Decoder):
    """A decoder that has room for so many tokens of one forward."""

    most = 40
    n_refused = 0

    def hidden(self, input_ids, *given, **named):
        if input_ids.numel() > self.most:
            Full.n_refused += 1
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
        return super().hidden(input_ids, *given, **named)


QUERIES = [Query((*range(3, 60), 100 + i, *range(200, 200 + 11 * (i % 3))), (7, 8)) for i in range(9)]


def test_where_memory_is_short_batches_are_halved_and_scores_are_the_same(tiny_llama):
    decoder = load_decoder(open_checkpoint(tiny_llama))
    wanted = Scorer(decoder).score(QUERIES)
    decoder.__class__ = Full
    scorer = Scorer(decoder)
    found = scorer.score(QUERIES)
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in wanted], abs=1e-4)
    assert scorer.warnings == ["memory was short: from then on 28 tokens were computed at a time"]
    refused = Full.n_refused
    scorer.score(QUERIES)
    assert Full.n_refused == refused > 0  # no batch is tried that has failed before
    Full.most = 4
    try:
        with pytest.raises(RequirementError, match="do not fit either"):
            Scorer(decoder).score(QUERIES)
    finally:
        Full.most = 40


def test_where_memory_is_short_answers_are_generated_fewer_at_a_time(tiny_llama):
    ckpt = open_checkpoint(tiny_llama)
    lm = make_lm(ckpt)
    asked = [Request(i, (*range(5, 15), 100 + i), (), 4, Sampling()) for i in range(7)]
    wanted = lm.scorer.generate(asked, lm.encoder, [])
    lm.scorer.decoder.__class__ = Full
    assert lm.scorer.generate(asked, lm.encoder, []) == wanted
    assert lm.scorer.warnings == ["memory was short: answers were generated 2 at a time"]


def test_other_errors_are_what_they_are(tiny_llama, monkeypatch):
    decoder = load_decoder(open_checkpoint(tiny_llama))
    monkeypatch.setattr(Decoder, "hidden", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        Scorer(decoder).score(QUERIES)
