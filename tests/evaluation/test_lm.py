"""Our LM against lm-eval's own `hf` backend, on the same tiny model and tokenizer."""

from __future__ import annotations

import logging

import pytest
from lm_eval.api.instance import Instance

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import InputError
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.lm import resolve_max_length
from llmkit.evaluation.runner import make_lm

STEM = "The following are multiple choice questions (with answers) about small things.\n\n"
QUESTIONS = [
    "Which of these is a fruit?\nA. stone\nB. apple\nAnswer:",
    "How many legs has a spider?\nA. 6\nB. 8\nAnswer:",
    "How many legs has a spider?\nA. 6\nB. 0.50\nAnswer: ",  # a space that belongs to the continuation
    "以下是中国关于法学的单项选择题。\n答案：",
]


def requests(kind, argument_list):
    return [
        Instance(request_type=kind, doc={}, arguments=arguments, idx=i, metadata=("t", i, 1))
        for i, arguments in enumerate(argument_list)
    ]


@pytest.fixture(scope="module", params=["plain", "bos"])
def both(request, tiny_llama, tiny_llama_bos):
    """(ours, theirs) over the same folder."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = tiny_llama if request.param == "plain" else tiny_llama_bos
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return make_lm(open_checkpoint(folder), EngineOptions(batch_tokens=100)), theirs


def agree(ours, theirs):
    assert len(ours) == len(theirs)
    for (a, is_a), (b, is_b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert is_a == is_b


def test_one_token_choices(both):
    ours, theirs = both
    asked = [(STEM + q, f" {letter}") for q in QUESTIONS for letter in "ABCD"]
    agree(
        ours.loglikelihood(requests("loglikelihood", asked)),
        theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True),
    )


def test_longer_continuations_empty_contexts_and_repeats(both):
    ours, theirs = both
    asked = [
        ("", "apple river"),
        ("Which of these is a fruit?", " apple river stone"),
        ("Which of these is a fruit?", " apple"),
        ("Which of these is a fruit?", " apple"),
        ("Which of these is a fruit? apple", " river"),
        ("<s>Which", " of these"),
        ("", "答案：A"),
    ]
    agree(
        ours.loglikelihood(requests("loglikelihood", asked)),
        theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True),
    )


def test_prompts_beyond_the_context_lose_the_same_tokens(both):
    ours, theirs = both
    assert ours.max_length == theirs.max_length == 96
    long = STEM * 6
    asked = [(long + q, f" {letter}") for q in QUESTIONS for letter in "AB"]
    before = ours.n_truncated
    agree(
        ours.loglikelihood(requests("loglikelihood", asked)),
        theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True),
    )
    assert ours.n_truncated - before == len(QUESTIONS)


def test_rolling_windows(both):
    ours, theirs = both
    asked = [(STEM,), (STEM * 9,), ("apple",)]
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", asked))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=1e-2, rel=1e-6)


@pytest.mark.parametrize("until", [[], ["\n"], "e", ["zzz", "an"]])
def test_greedy_generation(both, until):
    ours, theirs = both
    arguments = {"until": until, "max_gen_toks": 12, "do_sample": False}
    asked = [(STEM[: 30 + 9 * i], dict(arguments)) for i in range(5)]
    got = ours.generate_until(requests("generate_until", asked))
    wanted = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert got == wanted
    assert len(set(got)) > 1


def test_generation_stops_at_the_end_token(tiny_llama):
    import torch

    lm = make_lm(open_checkpoint(tiny_llama))
    (free,) = lm.generate_until(requests("generate_until", [("apple", {"until": [], "max_gen_toks": 8})]))
    ids = lm.tok_encode("apple")
    logits = lm.scorer.decoder(torch.tensor([ids]))
    lm.eos_ids = [int(logits[0, -1].argmax())]
    (stopped,) = lm.generate_until(requests("generate_until", [("apple", {"until": [], "max_gen_toks": 8})]))
    assert free != ""
    assert stopped == ""


def test_more_new_tokens_than_the_model_takes_is_an_error(tiny_llama):
    lm = make_lm(open_checkpoint(tiny_llama))
    with pytest.raises(InputError, match="96 in all"):
        lm.generate_until(requests("generate_until", [("apple", {"max_gen_toks": 500})]))


def test_chat_templates_are_the_tokenizers(both):
    ours, theirs = both
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for text in (template, strict):
        ours.tokenizer.chat_template = theirs.tokenizer.chat_template = text
        assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)


def test_the_letter_ids_are_remembered(tiny_llama):
    lm = make_lm(open_checkpoint(tiny_llama))
    lm.loglikelihood(requests("loglikelihood", [("Answer:", f" {letter}") for letter in "AB"]))
    assert lm.continuations == {f" {x}": tuple(lm.tok_encode(f" {x}")) for x in "AB"}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "max_position_embeddings": 5}, 1024),
        ({"text_config": {"n_ctx": 77}, "n_positions": 9}, 77),
        ({}, 300),
    ],
)
def test_the_longest_input(config, length):
    class Tokenizer:
        model_max_length = 300

    assert resolve_max_length(config, Tokenizer()) == length
    Tokenizer.model_max_length = int(1e30)
    assert resolve_max_length({}, Tokenizer()) == 2048
