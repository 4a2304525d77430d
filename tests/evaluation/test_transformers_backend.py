"""`--backend transformers`: families that no plugin describes, against lm-eval's `hf` backend and `generate`."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from tiny_tokenizer import train_tokenizer

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_backend
from llmkit.decoder.generate import generate
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.perplexity import measure_perplexity
from llmkit.evaluation.runner import make_lm

SIZES = {"vocab_size": 380, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
FAMILIES = {
    # learned positions, multi-query
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "tie_word_embeddings": False},
    # logits are scaled after the head; tied
    "cohere": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "pad_token_id": 2,
    },
    # ALiBi: takes no positions, so that a padded prompt must be computed alone
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96},
    # keeps a state instead of keys
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 2},
}
STEM = "The following are multiple choice questions (with answers) about small things.\n\n"
QUESTIONS = [
    "Which of these is a fruit?\nA. stone\nB. apple\nAnswer:",
    "How many legs has a spider?\nA. 6\nB. 8\nAnswer:",
]


def requests(kind, argument_list):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("t", i, 1))
        for i, a in enumerate(argument_list)
    ]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param])
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return make_lm(open_checkpoint(folder), EngineOptions(backend="transformers", batch_tokens=200)), theirs


def test_scores_are_those_of_the_hf_backend(both):
    ours, theirs = both
    asked = [(STEM + q, f" {letter}") for q in QUESTIONS for letter in "ABCD"]
    asked += [("Which of these is a fruit?", " apple river stone"), ("", "apple river"), ("apple", " river")]
    got = ours.loglikelihood(requests("loglikelihood", asked))
    wanted = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert [s for s, _ in got] == pytest.approx([s for s, _ in wanted], abs=1e-4)
    assert [g for _, g in got] == [g for _, g in wanted]
    assert max(s for s, _ in got) - min(s for s, _ in got) > 1
    assert ours.scorer.usage.tokens == ours.scorer.usage.tokens_unshared


def test_generated_text_is_that_of_the_hf_backend(both):
    ours, theirs = both
    asked = [(STEM[: 30 + 9 * i], {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for i in range(4)]
    got = ours.generate_until(requests("generate_until", asked))
    assert got == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert len(set(got)) > 1


def test_greedy_tokens_of_a_padded_batch_are_those_of_generate(folder):
    ours = load_backend(open_checkpoint(folder), backend="transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    # none shorter than Mamba's convolution: transformers 4's own cache is wrong there
    prompts = [[5, 9, 40, 6], [7, 30, 31, 32, 33, 8, 12], [60, 44, 12, 9, 8]]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted.append(made[0, len(prompt) :].tolist())
    assert generate(ours, prompts, max_new_tokens=9) == wanted
    assert len({tuple(w) for w in wanted}) == 3


def test_perplexity_is_the_loss_of_transformers(folder):
    ours = load_backend(open_checkpoint(folder), backend="transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, 380, (60,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = float(theirs(input_ids=ids[None], labels=ids[None]).loss)
    assert measure_perplexity(ours, ids.tolist(), context=60).nll == pytest.approx(loss, rel=1e-5)


def test_the_default_asks_for_a_choice(folder, monkeypatch):
    monkeypatch.setattr(registry, "default_registry", lambda: registry.Registry([]))
    ckpt = open_checkpoint(folder)
    with pytest.raises(RequirementError, match="no plugin describes its architecture") as auto:
        load_backend(ckpt)
    assert auto.value.hint == "--backend transformers computes it with the installed transformers' class"
    with pytest.raises(RequirementError, match="no plugin describes its architecture") as ours:
        load_backend(ckpt, backend="llmkit")
    assert "llmkit plugins list" in ours.value.hint
    with pytest.raises(InputError, match="--backend 'hf' is unknown; expected auto, llmkit, transformers") as other:
        load_backend(ckpt, backend="hf")
    assert other.value.hint == "did you mean transformers?"


def test_a_model_of_a_plugin_may_be_computed_by_transformers_too(tiny_llama):
    ckpt = open_checkpoint(tiny_llama)
    ids = torch.randint(0, 380, (2, 30), generator=torch.Generator().manual_seed(0))
    theirs = load_backend(ckpt, backend="transformers")
    assert (theirs(ids) - load_backend(ckpt)(ids)).abs().max() < 1e-4
    assert (theirs.backend, load_backend(ckpt).backend) == ("transformers", "llmkit")
    assert theirs.context == 96
    with pytest.raises(InputError, match=r"0\.\.379"):
        theirs(ids + 380)


def test_what_transformers_does_not_know_is_refused(tiny_llama):
    from dataclasses import replace

    ckpt = open_checkpoint(tiny_llama)
    remote = {"architectures": ["OkapiForCausalLM"], "model_type": "okapi", "auto_map": {"AutoModelForCausalLM": "m.O"}}
    with pytest.raises(RequirementError, match="has no decoder for OkapiForCausalLM") as error:
        load_backend(replace(ckpt, config=remote), backend="transformers")
    assert "never run" in error.value.hint
    encoder = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    with pytest.raises(RequirementError, match="has no decoder for T5ForConditionalGeneration"):
        load_backend(replace(ckpt, config=encoder), backend="transformers")


def test_tensors_that_do_not_fit_are_refused(tiny_llama):
    from dataclasses import replace

    ckpt = open_checkpoint(tiny_llama)
    name = "model.layers.1.mlp.up_proj.weight"
    less = {n: t for n, t in ckpt.tensors.items() if n != name}
    with pytest.raises(SpecError, match=rf"LlamaForCausalLM needs other tensors: {name}"):
        load_backend(replace(ckpt, tensors=less), backend="transformers")
    more = {**ckpt.tensors, "model.odd.weight": ckpt.tensors[name]}
    with pytest.raises(SpecError, match=r"LlamaForCausalLM has no model\.odd\.weight"):
        load_backend(replace(ckpt, tensors=more), backend="transformers")
