"""Benchmarks in chat formats: what the model is given, token by token."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from llmkit.architecture.prompts import FORMATS, Message
from llmkit.architecture.tokenizers import published_tokenizers
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import InputError
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.lm import SharedPrefixLM
from llmkit.evaluation.runner import make_lm
from llmkit.tokenization.chat import encode_pieces
from llmkit.tokenization.published import build_tokenizer
from tests.evaluation.running import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))

TALK = [
    {"role": "system", "content": "Be brief.\n\n"},
    {"role": "user", "content": "Which is a fruit?"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "How many legs</s>?"},
]


def asked(lm, context, answers=("A", "B")):
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, a), idx=i, metadata=("t", i, 1))
        for i, a in enumerate(answers)
    ]
    return [score for score, _ in lm.loglikelihood(requests)]


def plain_scores(lm, ids, answers):
    """Log-probabilities of answers' ids after the ids of a prompt, by the decoder alone."""
    found = []
    for answer in answers:
        logits = lm.scorer.decoder(torch.tensor([[*ids, *answer]])).log_softmax(-1)[0]
        found.append(sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer)))
    return found


@pytest.fixture(scope="module")
def plain_lm(tiny_llama_bos):
    return make_lm(open_checkpoint(tiny_llama_bos), max_length=400)


def with_format(lm, name, tokenizer=None):
    return SharedPrefixLM(lm.scorer, tokenizer or lm.tokenizer, max_length=400, prompt=FORMATS[name])


@pytest.mark.parametrize("name", ["vicuna", "koala", "belle", "openbuddy", "vicuna-v0"])
def test_scores_are_those_of_the_pieces_and_the_answer(plain_lm, name):
    lm = with_format(plain_lm, name)
    messages = [Message(m["role"], m["content"].rstrip()) for m in TALK]
    if FORMATS[name].system is None:
        messages = [Message("user", "Be brief.\n\nWhich is a fruit?"), *messages[2:]]
    pieces = list(FORMATS[name].pieces(messages))
    lead = " " if FORMATS[name].assistant != "{answer}\n\n" else ""
    whole = [encode_pieces(lm.tokenizer, [*pieces[:-1], pieces[-1] + lead + x]) for x in "AB"]
    ids = encode_pieces(lm.tokenizer, [*pieces[:-1], pieces[-1].rstrip()])
    assert all(w[: len(ids)] == ids for w in whole)
    assert whole[0].count(2) == (name in ("vicuna", "koala"))  # no end token out of the question
    got = asked(lm, lm.apply_chat_template(TALK))
    assert got == pytest.approx(plain_scores(lm, ids, [w[len(ids) :] for w in whole]), abs=1e-4)


@pytest.fixture(scope="module")
def glm():
    import vocab_world

    kind = published_tokenizers()["glm-sentencepiece"]
    data = vocab_world.sp_model(vocab_world.ENGLISH, 360)
    return build_tokenizer(kind, {kind.file: data}, {}, {}, "m")


def test_a_format_of_tokens_is_scored_after_its_role(plain_lm, glm):
    """ChatGLM3 answers with a line of its own for metadata, encoded apart."""
    lm = with_format(plain_lm, "chatglm3", glm)
    messages = [Message(m["role"], m["content"].rstrip()) for m in TALK]
    line = glm("\n", add_special_tokens=False)["input_ids"]
    ids = [*encode_pieces(glm, FORMATS["chatglm3"].pieces(messages)), *line]
    answers = [glm(x, add_special_tokens=False)["input_ids"] for x in "AB"]
    assert ids[0] < 380
    assert asked(lm, lm.apply_chat_template(TALK)) == pytest.approx(plain_scores(lm, ids, answers), abs=1e-4)


def test_an_answer_after_the_tokenizers_own_end_of_question():
    """ChatGLM-6B: question [gMASK] <sop> answer, the two encoded apart."""
    import vocab_world

    kind = published_tokenizers()["ice-text"]
    data = vocab_world.sp_model(
        vocab_world.ENGLISH, 560, control_symbols=list(kind.reserved), user_defined_symbols=["<n>", *kind.appended]
    )
    tokenizer = build_tokenizer(kind, {kind.file: data}, {"num_image_tokens": 0, "pad_token": "<s>"}, {}, "m")
    head = tokenizer("the quick\nfox ")["input_ids"]
    tail = tokenizer("over", add_special_tokens=False)["input_ids"]
    assert Encoder(tokenizer).encode_pairs([("the quick\nfox ", " over")]) == [(head, tail)]
    assert tokenizer.convert_ids_to_tokens(head[-2:]) == ["[gMASK]", "<sop>"]


def test_stop_texts_and_tokens_of_the_format_end_an_answer(plain_lm):
    arguments = {"until": [], "max_gen_toks": 10, "do_sample": False}

    def answer(lm):
        context = lm.apply_chat_template(TALK[1:])
        request = Instance(
            request_type="generate_until", doc={}, arguments=(context, dict(arguments)), idx=0, metadata=("t", 0, 1)
        )
        return lm.generate_until([request])[0]

    lm = with_format(plain_lm, "belle")
    free = answer(lm)
    lm.stops = (free[2:4],)
    assert answer(lm) == free[: free.index(free[2:4])]
    assert with_format(plain_lm, "vicuna-v0").stops == ("###",)


def test_an_answer_that_a_task_begins_is_refused(plain_lm):
    with pytest.raises(InputError, match="begins the answer itself"):
        with_format(plain_lm, "vicuna").apply_chat_template(TALK[:3], add_generation_prompt=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split in ("dev", "test"):
        (root / split).mkdir()
        with (root / split / f"virology_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([f"Which {i}?", "apple", "stone", "None", "river", "ABCD"[i]] for i in range(3))
    return root


def test_a_run_in_named_formats(tiny_llama, data, monkeypatch):
    seen = []
    score = SharedPrefixLM.loglikelihood

    def spy(self, requests, **options):
        if self.scorer.backend != "preview":  # which looks at lengths
            seen.append(str(requests[0].args[0]))
        return score(self, requests, **options)

    monkeypatch.setattr(SharedPrefixLM, "loglikelihood", spy)
    for name in ("alpaca", "vicuna", "raw"):
        record = evaluate(tiny_llama, "mmlu", data=data, shots=1, limit=2, chat_template=name)
        assert record.settings["prompt_format"] == (None if name == "raw" else name)
        assert record.settings["chat_template"] == (False if name == "raw" else name)
    alpaca, vicuna, raw = seen
    head = "The following are multiple choice questions (with answers) about virology."
    # no history in Alpaca's format: the shots are part of its one question
    assert alpaca.count("### Instruction:") == 1
    assert f"### Instruction:\n{head}\n\nWhich 0?" in alpaca
    assert alpaca.endswith("Answer:\n\n### Response:")
    assert vicuna.count("USER: Which") == 2
    assert f"{head} USER: Which 0?" in vicuna
    assert raw.startswith(head)
    assert raw.endswith("Answer:")


def test_what_has_no_chat_format(tiny_llama, data):
    with pytest.raises(InputError) as caught:
        evaluate(tiny_llama, "mmlu", data=data, shots=1, chat_template=True)
    assert "has no chat template, and no plugin a prompt format for it" in caught.value.message
    assert "--chat-template vicuna" in caught.value.hint
    with pytest.raises(InputError, match="unknown prompt format 'vicunna'"):
        evaluate(tiny_llama, "mmlu", data=data, shots=1, chat_template="vicunna")
    with pytest.raises(InputError, match=r"the token <\|user\|>, which this tokenizer has not"):
        evaluate(tiny_llama, "mmlu", data=data, shots=0, chat_template="chatglm3")


@pytest.mark.slow
@pytest.mark.shared
def test_smollm2_in_its_chat_template_scores_as_lm_evals_hf_backend(shared, shallow_smollm2):
    """The same prompts, choices and log-probabilities."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.benches import load_bench
    from llmkit.evaluation.csv_data import find_data
    from llmkit.evaluation.tasks import bench_task, quiet_lm_eval, set_shots

    bench = load_bench("mmlu")
    found = find_data(bench, shared / "data" / "mmlu")

    def run(lm):
        task = bench_task(bench, "anatomy", found.read("anatomy", shots=1))
        set_shots(task, 1)
        with quiet_lm_eval():
            done = lm_evaluate(
                lm,
                {"mmlu_anatomy": task},
                limit=3,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                log_samples=True,
            )
        return sorted(done["samples"]["mmlu_anatomy"], key=lambda s: s["doc_id"])

    theirs = run(HFLM(pretrained=str(shallow_smollm2), device="cpu", dtype="float32", batch_size=1))
    ours = run(make_lm(open_checkpoint(shallow_smollm2), chat_template=True))
    for a, b in zip(ours, theirs, strict=True):
        assert a["prompt_hash"] == b["prompt_hash"]
        assert "<|im_start|>assistant" in a["arguments"][0][0]
        scores = [[r[0] for r in x["filtered_resps"]] for x in (a, b)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert len({s.index(max(s)) for s in scores}) == 1
